"""Rendezvous of the ranks at start: reports which ranks are missing, and turns a failure into a one-line error."""

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

REPORT_AFTER_S = 10.0
REGISTER_AFTER_S = 1.0
"""Ranks that meet sooner, as on one node, are not counted."""


@contextmanager
def report_missing_ranks(timeout: timedelta | None) -> Iterator[None]:
    """Within this block, report how many ranks have arrived once that takes longer than `REPORT_AFTER_S` seconds.

    Args:
        timeout: how long the block waits, for the message; None: as long as DeepSpeed chooses.

    Raises:
        PreflightError: not all ranks arrived.
    """
    counter = _RankCounter()
    try:
        yield
    # Errors of torch's stores and sockets share no more specific class across its versions.
    except RuntimeError as error:
        failure = rendezvous_failure(error, timeout)
        if counter.is_unanswered:
            # Rank 0, which prints errors for all ranks, is missing.
            print(f"das_ds: {failure}", file=sys.stderr, flush=True)
        raise failure from error
    finally:
        counter.stop()


def rendezvous_failure(error: RuntimeError, timeout: timedelta | None) -> PreflightError:
    """What a user is told of an error of torch's rendezvous.

    Args:
        error: of torch's stores and sockets.
        timeout: how long ranks were waited for; None: as long as DeepSpeed chooses.
    """
    # The only failure of rank 0 that comes at once, so no rank has been waited for.
    if "EADDRINUSE" in str(error):
        return PreflightError(
            f"MASTER_PORT: found {os.environ['MASTER_PORT']}, which is in use on this machine, perhaps by another run; "
            "expected a free port (deepspeed --master_port, torchrun --master-port)"
        )
    limit = "" if timeout is None else f" within {timeout.total_seconds():g} s (runtime.hang_timeout)"
    return PreflightError(
        f"the ranks do not find each other{limit}: {str(error).splitlines()[0].rstrip('.')}; check that as many "
        "processes start as WORLD_SIZE says, that all have the same MASTER_ADDR and MASTER_PORT, and that this "
        "address is reached from every node"
    )


class _RankCounter:
    """Counts the ranks that have arrived, through the store of the rendezvous, and reports once how many they are."""

    def __init__(self) -> None:
        self._rank = int(os.environ["RANK"])
        self._world_size = int(os.environ["WORLD_SIZE"])
        self._host = os.environ["MASTER_ADDR"]
        self._port = int(os.environ["MASTER_PORT"])
        self._start = time.monotonic()
        self._stopped = threading.Event()
        self.is_unanswered = False
        """Whether this rank is not rank 0 and gets no answer from it."""
        if self._world_size > 1:
            threading.Thread(target=self._run, name="das-ds-rendezvous", daemon=True).start()

    def stop(self) -> None:
        """End the thread: the rendezvous succeeded or failed."""
        self._stopped.set()

    def _run(self) -> None:
        # An error here costs a report only: a rendezvous that fails raises its own.
        with ThreadGuard("the ranks that have started cannot be counted"):
            self._count()

    def _count(self) -> None:
        if self._stopped.wait(REGISTER_AFTER_S):
            return
        store = self._register()
        if self._stopped.wait(max(0.0, self._start + REPORT_AFTER_S - time.monotonic())):
            return
        where = f"{self._host}:{self._port} (WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT are set in the environment)"
        if self._rank == 0:
            self._report(f"{self._num_present(store)} of {self._world_size} ranks here, waiting at {where}")
        elif store is None:
            self.is_unanswered = True
            self._report(f"rank {self._rank} of {self._world_size} is here, but gets no answer from {where}")

    def _register(self) -> Store | None:
        """Count this rank at the store, over a separate connection; None: the store does not answer."""
        # Tried with a plain socket first, because the store's client would log every failed attempt.
        while not self._is_answered():
            if self._stopped.wait(0.5) or time.monotonic() > self._start + REPORT_AFTER_S:
                return None
        try:
            timeout = timedelta(seconds=REPORT_AFTER_S)
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

    def _num_present(self, store: Store | None) -> int:
        try:
            return 1 if store is None else max(1, store.add(self._key, 0))
        except RuntimeError:
            return 1

    @property
    def _key(self) -> str:
        # torchrun keeps its store when it restarts the ranks, so each restart needs a key of its own.
        return f"das_ds/rendezvous/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"

    def _report(self, text: str) -> None:
        print(f"das_ds: {text}", file=sys.stderr, flush=True)
