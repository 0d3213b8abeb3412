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

from das_ds.distributed.launch import Ranks
from das_ds.distributed.row_exchange import RowExchange, store_is_on_rank_0
from das_ds.distributed.sights import Sights
from das_ds.distributed.whereabouts import Row, stack_position
from das_ds.errors import DasError, StoppedError

EXIT_HANG = 1
PERIOD_S = 1.0
LOST_AFTER_ROUNDS = 3.0
"""A rank whose row is this old has ended, where there is reason to think that one has. A round is a second, or the time
between two readings of all rows if that is longer."""
LOOK_FOR_LOST_ROUNDS = 8.0
LEFT_GRACE_S = 10.0
"""Seconds after which a rank that waits for one that has left with an error ends too."""
MAX_ERROR_LENGTH = 200
CONFER_ROUNDS = 3.0
"""Time for all ranks to read why the run ends, before a process that ends breaks their connections."""


class LostPeerError(RuntimeError):
    """Another rank has ended; the message names it."""


class Watch:
    """Watches the ranks between `with` and its end, from a thread of its own.

    The main thread says where it stands. Where it has said nothing new for `hang_timeout` seconds, or another rank has
    given no sign of life for so long, this process ends with exit code 1, and so do the others. A RuntimeError that
    leaves the block because another rank has ended becomes a `LostPeerError`.

    All ranks build it together, and leave it together unless they leave with an error.

    Args:
        ranks: the process group.
        hang_timeout: seconds without progress.
        folder: run folder, in which each rank writes its stacks when it ends for lack of progress.
    """

    def __init__(self, ranks: Ranks, hang_timeout: float, folder: Path) -> None:
        self._ranks, self._hang_timeout, self._folder = ranks, hang_timeout, folder
        self._main, self._host, self._pid = threading.get_ident(), socket.gethostname(), os.getpid()
        self._phase, self._place, self._step = "", "starting", 0
        self._steps, self._passed, self._patience = 0, 0, 0
        self._beat = 0
        self._left: str | None = None
        self._main_decides = False
        self._idle_since = self._clock = 0.0
        self._holds_store = ranks.info.is_main and ranks.info.world_size > 1 and store_is_on_rank_0()
        self._period_s = min(PERIOD_S, hang_timeout / 10)
        self._exchange = RowExchange(ranks, self._row, self._period_s)
        self._round_s = max(1.0, self._exchange.read_every_s)
        self._sights = Sights(ranks.info.rank, hang_timeout, self._round_s)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="das-ds-watch", daemon=True)
        self._thread.start()

    def phase(self, name: str) -> None:
        """What the steps that follow belong to, such as the name of a domain."""
        self._phase, self._steps, self._passed = name, self._steps + 1, 0

    def at(self, place: str, step: int) -> None:
        """This rank has come to `place` in `step`; costs next to nothing."""
        if step != self._step:
            self._step = step
            self._steps += 1
            self._passed = 0
        self._place = place
        self._passed += 1

    @contextmanager
    def patient(self, place: str) -> Iterator[None]:
        """A place that may take any time: only a rank that is dead or frozen ends the run."""
        former, self._place = self._place, place
        self._patience += 1
        try:
            yield
        finally:
            self._patience -= 1
            self._place = former
            self._passed += 1

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        if error is not None and not isinstance(error, StoppedError):
            self._leave_alone(error)
            return
        try:
            self._place = "leaving"
            # A rank that ends takes its row, and rank 0 the store, from those that are still here.
            self._ranks.barrier()
        except RuntimeError as failure:
            self._leave_alone(failure)
            raise
        self._close()

    def _leave_alone(self, error: BaseException) -> None:
        """Tell the others that this rank leaves with an error.

        Raises:
            LostPeerError: the error came of another rank's end.
        """
        self._main_decides = True
        lost = self._lost_peer() if isinstance(error, RuntimeError) else None
        self._left = f"{type(error).__name__}: {error}".splitlines()[0][:MAX_ERROR_LENGTH]
        self._close()
        if self._holds_store and not isinstance(error, DasError):
            # The others have to read it first. What a user has to mend all ranks know already.
            time.sleep(2 * self._round_s)
        if lost is not None:
            raise LostPeerError(lost) from error

    def _close(self) -> None:
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._exchange.close(wait_s=CONFER_ROUNDS * self._round_s)

    def _lost_peer(self) -> str | None:
        """Why another rank is no longer there; None after some seconds in which all have given signs of life."""
        deadline = time.monotonic() + LOOK_FOR_LOST_ROUNDS * self._round_s
        while time.monotonic() < deadline:
            if found := self._sights.lost(LOST_AFTER_ROUNDS * self._round_s):
                return self._confer(found)
            time.sleep(self._period_s / 2)
        return None

    def _run(self) -> None:
        seen, last = None, time.monotonic()
        while not self._ended.wait(self._period_s):
            now = time.monotonic()
            # A process that was suspended with all others must not take that time for theirs.
            self._clock += min(now - last, 2 * self._period_s)
            last = now
            # This thread cannot run while other code keeps Python's lock, but this timer can.
            faulthandler.dump_traceback_later(self._hang_timeout + CONFER_ROUNDS * self._round_s, file=2)
            progress = (self._steps, self._passed)
            if progress != seen:
                seen, self._idle_since = progress, self._clock
            self._sights.update(self._exchange.table, self._clock)
            if not self._main_decides and (found := self._sights.fault(self._row(), LEFT_GRACE_S)):
                self._end(found)

    def _end(self, found: str) -> None:
        """End this process, after all ranks could read why."""
        verdict = self._confer(found)
        stacks = self._folder / f"hang-rank{self._ranks.info.rank}.txt"
        text = f"das_ds: {verdict}; all ranks end"
        try:
            with stacks.open("w", encoding="utf-8") as file:
                file.write(f"{text}\n")
                file.flush()
                faulthandler.dump_traceback(file)
            text += f"; stacks: {stacks}"
        except OSError as error:
            text += f"; stacks could not be written: {error}"
        print(text, file=sys.stderr, flush=True)
        os._exit(EXIT_HANG)

    def _confer(self, found: str) -> str:
        """The verdict that stands, after time enough for all ranks to know it."""
        if self._exchange.table.is_lost:
            return found
        self._exchange.propose(found)
        # The process that holds the store is the last to end.
        time.sleep((CONFER_ROUNDS + (1.0 if self._holds_store else 0.0)) * self._round_s)
        return self._exchange.table.verdict or found

    def _row(self) -> Row:
        waits, frame = stack_position(self._main)
        self._beat += 1
        return Row(
            rank=self._ranks.info.rank,
            host=self._host,
            pid=self._pid,
            beat=self._beat,
            phase=self._phase,
            place=self._place,
            step=self._step,
            progress=(self._steps, self._passed),
            idle=self._clock - self._idle_since,
            patient=self._patience > 0,
            waits=waits,
            frame=frame,
            left=self._left,
        )
