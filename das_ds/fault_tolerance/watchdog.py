"""Never wait for ever: every rank watches all ranks, and all end with a message that names the one that is stuck."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from das_ds.distributed.collectives import COLLECTIVE_COUNT
from das_ds.distributed.process_group import ProcessGroup
from das_ds.errors import DasError, StoppedError
from das_ds.fault_tolerance.hang_detector import HangDetector
from das_ds.fault_tolerance.heartbeat import Heartbeat
from das_ds.fault_tolerance.heartbeat_store import HeartbeatStore, store_is_on_rank_0
from das_ds.fault_tolerance.stack_dump import StackReport, inspect_stacks
from das_ds.thread_guard import ThreadGuard

EXIT_HANG = 1
PERIOD_S = 1.0
LOST_AFTER_ROUNDS = 3.0
"""A rank whose heartbeat is this old has ended, where there is reason to think that one has. A round is a second, or
the time between two readings of all heartbeats if that is longer."""
FIND_LOST_ROUNDS = 8.0
EXIT_GRACE_S = 10.0
"""Seconds after which a rank that waits for one that has left with an error ends too."""
MAX_ERROR_LENGTH = 200
AGREEMENT_ROUNDS = 3.0
"""Time for all ranks to read why the run ends, before a process that ends breaks their connections."""


class PeerLostError(RuntimeError):
    """Another rank has ended; the message names it."""


class Watchdog:
    """Watches the ranks between `with` and its end, from a thread of its own.

    The main thread says where it stands. Where this rank has made no progress for `hang_timeout` seconds, and none that
    it may be waiting for is at work, this process ends with exit code 1, and so do the others. A RuntimeError that
    leaves the block because another rank has ended becomes a `PeerLostError`. A watchdog that can see nothing, as its
    own threads fail, says so and ends nothing.

    All ranks build it together, and leave it together unless they leave with an error.

    Args:
        ranks: the process group.
        hang_timeout: seconds without progress.
        folder: run folder, in which each rank writes its stacks when it ends for lack of progress.
    """

    def __init__(self, ranks: ProcessGroup, hang_timeout: float, folder: Path) -> None:
        self._ranks, self._hang_timeout, self._folder = ranks, hang_timeout, folder
        self._main, self._host, self._pid = threading.get_ident(), socket.gethostname(), os.getpid()
        self._phase, self._location, self._step = "", "starting", 0
        self._steps, self._passed, self._suspensions = 0, 0, 0
        self._seq = 0
        self._exit_error: str | None = None
        self._main_decides = False
        self._seen_progress: tuple[int, ...] = ()
        self._idle_since = self._clock = 0.0
        self._stacks = StackReport()
        self._holds_store = ranks.info.is_main and ranks.info.world_size > 1 and store_is_on_rank_0()
        self._period_s = min(PERIOD_S, hang_timeout / 10)
        self._store = HeartbeatStore(ranks, self._heartbeat, self._period_s)
        self._round_s = max(1.0, self._store.read_every_s)
        self._detector = HangDetector(ranks.info.rank, hang_timeout)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="das-ds-watchdog", daemon=True)
        self._thread.start()

    def set_phase(self, name: str) -> None:
        """What the steps that follow belong to, such as the name of a domain."""
        self._phase, self._steps, self._passed = name, self._steps + 1, 0

    def beat(self, location: str, step: int) -> None:
        """This rank has come to `location` in `step`; costs next to nothing."""
        if step != self._step:
            self._step = step
            self._steps += 1
            self._passed = 0
        self._location = location
        self._passed += 1

    @contextmanager
    def suspend_timeout(self, location: str) -> Iterator[None]:
        """A location that may take any time: only a rank that is dead or frozen ends the run."""
        former, self._location = self._location, location
        self._suspensions += 1
        try:
            yield
        finally:
            self._suspensions -= 1
            self._location = former
            self._passed += 1

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        if error is not None and not isinstance(error, StoppedError):
            self._report_exit(error)
            return
        try:
            self._location = "leaving"
            # A rank that ends takes its heartbeat, and rank 0 the store, from those that are still here.
            self._ranks.barrier()
        except RuntimeError as failure:
            self._report_exit(failure)
            raise
        self._close()

    def _report_exit(self, error: BaseException) -> None:
        """Tell the others that this rank leaves with an error.

        Raises:
            PeerLostError: the error came of another rank's end.
        """
        self._main_decides = True
        summary = f"{type(error).__name__}: {error}".splitlines()[0][:MAX_ERROR_LENGTH]
        lost = self._find_lost_peer(summary) if isinstance(error, RuntimeError) else None
        self._exit_error = summary
        self._close()
        if self._holds_store and not isinstance(error, DasError):
            # The others have to read it first. What a user has to mend all ranks know already.
            time.sleep(2 * self._round_s)
        if lost is not None:
            raise PeerLostError(lost) from error

    def _close(self) -> None:
        self._ended.set()
        self._thread.join()
        self._store.close(wait_s=AGREEMENT_ROUNDS * self._round_s)

    def _find_lost_peer(self, error: str) -> str | None:
        """Why another rank is no longer there; None after some seconds in which all have given signs of life."""
        deadline = time.monotonic() + FIND_LOST_ROUNDS * self._round_s
        while time.monotonic() < deadline:
            if found := self._detector.find_lost_peers(LOST_AFTER_ROUNDS * self._round_s):
                # The error is said as well: that of a rank that fails by itself while another is silent is the cause.
                return self._agree_on_failure(f"{found}; noticed by rank {self._ranks.info.rank} as {error}")
            time.sleep(self._period_s / 2)
        return None

    def _run(self) -> None:
        guard = ThreadGuard(
            f"the watchdog of rank {self._ranks.info.rank} failed: training goes on, unwatched while that lasts"
        )
        last = time.monotonic()
        while not self._ended.wait(self._period_s):
            now = time.monotonic()
            # A process that was suspended with all others must not take that time for theirs.
            self._clock += min(now - last, 2 * self._period_s)
            last = now
            with guard:
                self._check()

    def _check(self) -> None:
        progress = (self._steps, self._passed, COLLECTIVE_COUNT.entered, COLLECTIVE_COUNT.left)
        if progress != self._seen_progress:
            self._seen_progress, self._idle_since, self._stacks = progress, self._clock, StackReport()
        self._detector.update(self._store.snapshot, self._clock)
        if not self._suspensions and self._clock - self._idle_since > self._hang_timeout / 2:
            self._stacks = inspect_stacks(self._main)
        if not self._main_decides and (reason := self._detector.diagnose(self._heartbeat(), EXIT_GRACE_S)):
            self._terminate(reason)

    def _terminate(self, found: str) -> None:
        """End this process, after all ranks could read why."""
        reason = self._agree_on_failure(found)
        text = f"das_ds: {reason}; all ranks end"
        try:
            print(f"{text}; {self._write_stacks(text)}", file=sys.stderr, flush=True)
        finally:
            os._exit(EXIT_HANG)

    def _write_stacks(self, heading: str) -> str:
        """Write where all threads of this process stand; returns what came of it, in words."""
        path = self._folder / f"hang-rank{self._ranks.info.rank}.txt"
        try:
            with path.open("w", encoding="utf-8") as file:
                file.write(f"{heading}\n")
                file.flush()
                faulthandler.dump_traceback(file)
        except OSError as error:
            return f"stacks could not be written: {error}"
        return f"stacks: {path}"

    def _agree_on_failure(self, found: str) -> str:
        """The reason that stands, after time enough for all ranks to know it."""
        if self._store.snapshot.is_lost:
            return found
        self._store.report_failure(found)
        # The process that holds the store is the last to end.
        time.sleep((AGREEMENT_ROUNDS + (1.0 if self._holds_store else 0.0)) * self._round_s)
        return self._store.snapshot.failure_reason or found

    def _heartbeat(self) -> Heartbeat:
        self._seq += 1
        return Heartbeat(
            rank=self._ranks.info.rank,
            host=self._host,
            pid=self._pid,
            seq=self._seq,
            phase=self._phase,
            location=self._location,
            step=self._step,
            progress=(self._steps, self._passed),
            idle_s=self._clock - self._idle_since,
            timeout_suspended=self._suspensions > 0,
            in_collective=True if COLLECTIVE_COUNT.is_inside else self._stacks.in_collective,
            stack_location=self._stacks.location,
            exit_error=self._exit_error,
        )
