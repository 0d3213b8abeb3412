"""The meeting of all ranks as they start: nobody waits in silence, and a meeting that fails is one line."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch._C._distributed_c10d import Store, TCPStore

from das_ds.errors import PreflightError
from das_ds.thread_guard import ThreadGuard

SAY_AFTER_S = 10.0
REGISTER_AFTER_S = 1.0
"""Ranks that meet sooner, as in every sound start on one node, are not counted."""


@contextmanager
def report_missing_ranks(timeout: timedelta | None) -> Iterator[None]:
    """Say who is here once the ranks have not met for `SAY_AFTER_S` seconds within this block.

    Args:
        timeout: how long the block waits, for the message; None: as long as DeepSpeed chooses.

    Raises:
        PreflightError: the ranks did not meet.
    """
    count = _Count()
    try:
        yield
    # torch's errors of stores and sockets have no class of their own in all its versions.
    except RuntimeError as error:
        limit = "" if timeout is None else f" within {timeout.total_seconds():g} s (runtime.hang_timeout)"
        message = (
            f"the ranks do not find each other{limit}: {str(error).splitlines()[0].rstrip('.')}; check that as many "
            "processes start as WORLD_SIZE says, that all have the same MASTER_ADDR and MASTER_PORT, and that this "
            "address is reached from every node"
        )
        if count.is_unanswered:
            # Rank 0, which usually speaks for all, is not there to say it.
            print(f"das_ds: {message}", file=sys.stderr, flush=True)
        raise PreflightError(message) from error
    finally:
        count.stop()


class _Count:
    """Counts the ranks that wait, through the store at which they meet, and says once how many there are."""

    def __init__(self) -> None:
        self._rank, self._world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._host, self._port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._begin = time.monotonic()
        self._met = threading.Event()
        self.is_unanswered = False
        """Whether this rank is not rank 0 and nobody answers it."""
        if self._world_size > 1:
            threading.Thread(target=self._run, name="das-ds-meeting", daemon=True).start()

    def stop(self) -> None:
        """The ranks have met, or failed to."""
        self._met.set()

    def _run(self) -> None:
        # What cannot be said here is said by the meeting itself when it fails.
        with ThreadGuard("the ranks that have come cannot be counted"):
            self._count()

    def _count(self) -> None:
        if self._met.wait(REGISTER_AFTER_S):
            return
        store = self._registered()
        if self._met.wait(max(0.0, self._begin + SAY_AFTER_S - time.monotonic())):
            return
        where = f"{self._host}:{self._port} (WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT are set in the environment)"
        if self._rank == 0:
            present = self._present(store)
            self._say(f"{present} of {self._world_size} ranks here, waiting at {where}")
        elif store is None:
            self.is_unanswered = True
            self._say(f"rank {self._rank} of {self._world_size} is here, but nobody answers at {where}")

    def _registered(self) -> Store | None:
        """A connection of its own to the store, at which this rank is counted; None: nobody answers."""
        # The store's own client would log every attempt that fails.
        while not self._is_answered():
            if self._met.wait(0.5) or time.monotonic() > self._begin + SAY_AFTER_S:
                return None
        try:
            timeout = timedelta(seconds=SAY_AFTER_S)
            store = TCPStore(self._host, self._port, is_master=False, timeout=timeout, wait_for_workers=False)
            store.add(self._key, 1)
        except RuntimeError:
            return None
        return store

    def _is_answered(self) -> bool:
        try:
            socket.create_connection((self._host, self._port), timeout=1.0).close()
        except OSError:
            return False
        return True

    def _present(self, store: Store | None) -> int:
        try:
            return 1 if store is None else max(1, store.add(self._key, 0))
        except RuntimeError:
            return 1

    @property
    def _key(self) -> str:
        # torchrun keeps its store when it starts the ranks anew.
        return f"das_ds/meeting/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"

    def _say(self, text: str) -> None:
        print(f"das_ds: {text}", file=sys.stderr, flush=True)
