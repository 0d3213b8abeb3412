"""Hang watchdog: every rank monitors all others; on a hang, all exit with a message that names the stuck rank."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from das_ds.distributed.collectives import COLLECTIVE_COUNT
from das_ds.distributed.process_group import ProcessGroup
from das_ds.errors import DasError, StoppedError
from das_ds.fault_tolerance.hang_detector import HangDetector
from das_ds.fault_tolerance.heartbeat import Heartbeat
from das_ds.fault_tolerance.heartbeat_store import HeartbeatStore, store_is_on_rank_0
from das_ds.fault_tolerance.stack_dump import StackReport, inspect_stacks
from das_ds.run_dir import RunDir
from das_ds.thread_guard import ThreadGuard

EXIT_HANG = 1
PERIOD_S = 1.0
LOST_AFTER_ROUNDS = 3.0
"""Age from which a heartbeat counts as that of a lost rank, once a collective has failed. A round is one second, or the
time between two readings of all heartbeats if that is longer."""
FIND_LOST_ROUNDS = 8.0
"""How long to look for a lost rank after a collective has failed."""
EXIT_GRACE_S = 10.0
"""Seconds after which a rank exits that waits for a rank that exited with an error."""
MAX_ERROR_LENGTH = 200
AGREEMENT_ROUNDS = 3.0
"""Time for all ranks to read why the run ends, before a process that exits breaks their connections."""


class PeerLostError(RuntimeError):
    """Another rank has ended; the message names it."""


class Watchdog:
    """Watches the ranks inside its `with` block, from a background thread.

    The main thread reports its progress with `beat`. If this rank has made no progress for `hang_timeout` seconds, and
    no rank that it may be waiting for is working, this process exits with code 1, and so do the others. A RuntimeError
    that leaves the block because another rank has ended becomes a `PeerLostError`. A watchdog whose own threads fail
    logs that and ends nothing.

    All ranks build it together, and leave it together unless they leave with an error.

    Args:
        ranks: the process group.
        hang_timeout: seconds without progress that count as a hang.
        run_dir: where each rank writes its stacks when it exits because of a hang.
    """

    def __init__(self, ranks: ProcessGroup, hang_timeout: float, run_dir: RunDir) -> None:
        self._ranks = ranks
        self._hang_timeout = hang_timeout
        self._run_dir = run_dir
        self._main_thread = threading.get_ident()
        self._host = socket.gethostname()
        self._pid = os.getpid()
        # Written by the main thread, read by this one's heartbeats.
        self._phase = ""
        self._location = "starting"
        self._step = 0
        self._num_steps = 0
        self._num_locations = 0
        self._num_suspensions = 0
        self._exit_error: str | None = None
        self._main_decides = False
        # Written by the background thread.
        self._seq = 0
        self._seen_progress: tuple[int, ...] = ()
        self._clock = 0.0
        self._idle_since = 0.0
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
        """Name the phase that the next steps belong to, such as a domain."""
        self._phase = name
        self._num_steps += 1
        self._num_locations = 0

    def beat(self, location: str, step: int) -> None:
        """Report that this rank has reached `location` in `step`; cheap enough for every micro-step."""
        if step != self._step:
            self._step = step
            self._num_steps += 1
            self._num_locations = 0
        self._location = location
        self._num_locations += 1

    @contextmanager
    def suspend_timeout(self, location: str) -> Iterator[None]:
        """Around work that may take any time: only a rank whose process is dead or frozen ends the run."""
        previous = self._location
        self._location = location
        self._num_suspensions += 1
        try:
            yield
        finally:
            self._num_suspensions -= 1
            self._location = previous
            self._num_locations += 1

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        if error is not None and not isinstance(error, StoppedError):
            self._report_exit(error)
            return
        try:
            self._location = "leaving"
            # A rank that exits earlier would take its heartbeat, and rank 0 the store, from the others.
            self._ranks.barrier()
        except RuntimeError as failure:
            self._report_exit(failure)
            raise
        self._close()

    def _report_exit(self, error: BaseException) -> None:
        """Report to the other ranks that this one exits with an error.

        Raises:
            PeerLostError: the error was caused by the end of another rank.
        """
        self._main_decides = True
        summary = f"{type(error).__name__}: {error}".splitlines()[0][:MAX_ERROR_LENGTH]
        lost = self._find_lost_peer(summary) if isinstance(error, RuntimeError) else None
        self._exit_error = summary
        self._close()
        if self._holds_store and not isinstance(error, DasError):
            # The others have to read it first. User errors are raised on all ranks, so they know those already.
            time.sleep(2 * self._round_s)
        if lost is not None:
            raise PeerLostError(lost) from error

    def _close(self) -> None:
        self._ended.set()
        self._thread.join()
        self._store.close(wait_s=AGREEMENT_ROUNDS * self._round_s)

    def _find_lost_peer(self, error: str) -> str | None:
        """Why another rank has ended; None if all of them have sent heartbeats for some seconds."""
        deadline = time.monotonic() + FIND_LOST_ROUNDS * self._round_s
        while time.monotonic() < deadline:
            if lost := self._detector.find_lost_peers(LOST_AFTER_ROUNDS * self._round_s):
                # With the error: if this rank failed by itself while a peer was silent, the error is the cause.
                return self._agree_on_failure(f"{lost}; noticed by rank {self._ranks.info.rank} as {error}")
            time.sleep(self._period_s / 2)
        return None

    def _run(self) -> None:
        guard = ThreadGuard(
            f"the watchdog of rank {self._ranks.info.rank} failed: training continues without it while that lasts"
        )
        last = time.monotonic()
        while not self._ended.wait(self._period_s):
            now = time.monotonic()
            # Bounded, so that the time for which all processes were suspended together does not count as silence.
            self._clock += min(now - last, 2 * self._period_s)
            last = now
            with guard:
                self._check()

    def _check(self) -> None:
        progress = (self._num_steps, self._num_locations, COLLECTIVE_COUNT.entered, COLLECTIVE_COUNT.exited)
        if progress != self._seen_progress:
            self._seen_progress = progress
            self._idle_since = self._clock
            self._stacks = StackReport()
        self._detector.update(self._store.snapshot, self._clock)
        # Reading stacks stops all threads for a moment, so it is done only when a stall is suspected.
        if not self._num_suspensions and self._clock - self._idle_since > self._hang_timeout / 2:
            self._stacks = inspect_stacks(self._main_thread)
        if not self._main_decides and (reason := self._detector.diagnose(self._heartbeat(), EXIT_GRACE_S)):
            self._terminate(reason)

    def _terminate(self, reason: str) -> None:
        """Exit, after all ranks could read why."""
        agreed = self._agree_on_failure(reason)
        text = f"das_ds: {agreed}; all ranks exit"
        try:
            print(f"{text}; {self._write_stacks(text)}", file=sys.stderr, flush=True)
        finally:
            os._exit(EXIT_HANG)

    def _write_stacks(self, heading: str) -> str:
        """Write the stacks of all threads of this process; returns the outcome in words."""
        path = self._run_dir.hang_report(self._ranks.info.rank)
        try:
            with path.open("w", encoding="utf-8") as file:
                file.write(f"{heading}\n")
                file.flush()
                faulthandler.dump_traceback(file)
        except OSError as error:
            return f"stacks could not be written: {error}"
        return f"stacks: {path}"

    def _agree_on_failure(self, reason: str) -> str:
        """Report a reason, wait until all ranks could read it, and return the one that was reported first."""
        if self._store.snapshot.is_lost:
            return reason
        self._store.report_failure(reason)
        # The process that hosts the store exits last.
        time.sleep((AGREEMENT_ROUNDS + (1.0 if self._holds_store else 0.0)) * self._round_s)
        return self._store.snapshot.failure_reason or reason

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
            progress=(self._num_steps, self._num_locations),
            idle_s=self._clock - self._idle_since,
            timeout_suspended=self._num_suspensions > 0,
            in_collective=True if COLLECTIVE_COUNT.is_inside else self._stacks.in_collective,
            stack_location=self._stacks.location,
            exit_error=self._exit_error,
        )
