"""The ranks' rows in the store that made the process group; a thread, as the store may answer late or never again."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from das_ds.distributed.launch import PREPARATION_TIMEOUT, Ranks
from das_ds.distributed.whereabouts import Row

READERS_PER_S = 64
"""With more ranks than this each reads the rows less often, so that the store has time for training's needs."""
_num_exchanges = 0


@dataclass(frozen=True)
class Table:
    """What the store answered last."""

    rows: tuple[Row, ...]
    verdict: str
    """What ended the run, in the words of the rank that found it first; empty: nothing."""
    num_answers: int
    """Counts the store's answers."""
    is_lost: bool
    """The connection to the store is broken: the process that holds it has ended."""


class RowExchange:
    """Publishes this rank's row and reads those of all ranks, once a period.

    Built by all ranks together. Uses a connection of its own: calls over one connection wait for each other.

    Args:
        ranks: the process group.
        own_row: this rank's row as it is now.
        period_s: seconds between two rows.
    """

    def __init__(self, ranks: Ranks, own_row: Callable[[], Row], period_s: float) -> None:
        global _num_exchanges
        _num_exchanges += 1
        self._own_row, self._period_s = own_row, period_s
        # Typed as a store of any kind, which need not have all that the one behind the process group has.
        store: Any = dist.distributed_c10d._get_default_store()
        self._store = store.clone()
        # An answer that comes after its time would be taken for that to the next question; and where the process that
        # holds the store is suspended together with this one, it comes late.
        self._store.set_timeout(PREPARATION_TIMEOUT)
        prefix = f"das_ds/watch/{_num_exchanges}"
        self._keys = [f"{prefix}/{rank}" for rank in range(ranks.info.world_size)]
        self._key, self._verdict_key = self._keys[ranks.info.rank], f"{prefix}/verdict"
        self.read_every_s = period_s * max(1.0, ranks.info.world_size / READERS_PER_S)
        self._next_read = 0.0
        self._proposal: str | None = None
        self._wake, self._is_ended = threading.Event(), False
        self._publish()
        if ranks.info.is_main:
            self._store.set(self._verdict_key, "")
        ranks.barrier()
        self.table = Table((), "", 0, is_lost=False)
        self._read()
        self._thread = threading.Thread(target=self._run, name="das-ds-rows", daemon=True)
        self._thread.start()

    @property
    def thread(self) -> int | None:
        """Identity of the thread."""
        return self._thread.ident

    def propose(self, verdict: str) -> None:
        """Tell all ranks what ended the run; the first proposal stands, and is soon read from the table."""
        self._proposal = verdict
        self._wake.set()

    def close(self, wait_s: float) -> None:
        """Publish this rank's row a last time and end; a store that does not answer is left alone after `wait_s`."""
        self._is_ended = True
        self._wake.set()
        self._thread.join(wait_s)

    def _run(self) -> None:
        while not self._is_ended:
            self._wake.wait(self._period_s)
            self._wake.clear()
            try:
                self._publish()
                self._read()
            except RuntimeError:
                # A connection that is broken never comes back.
                self.table = replace(self.table, is_lost=True)
                return

    def _publish(self) -> None:
        self._store.set(self._key, self._own_row().model_dump_json())
        if self._proposal is not None:
            self._store.compare_set(self._verdict_key, "", self._proposal)

    def _read(self) -> None:
        now = time.monotonic()
        if now < self._next_read and self._proposal is None:
            return
        self._next_read = now + self.read_every_s
        *rows, verdict = self._store.multi_get([*self._keys, self._verdict_key])
        table = tuple(Row.model_validate_json(row) for row in rows)
        self.table = Table(table, verdict.decode(), self.table.num_answers + 1, is_lost=False)


def store_is_on_rank_0() -> bool:
    """Whether the store lives in rank 0's process; under torchrun it lives in the launcher's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
