"""Rows of a table on any number of ranks, which are played in turn here; collectives run in `tests/smoke`."""

from __future__ import annotations

import pytest
import torch

from das_ds.distributed import sharded_buffer
from das_ds.distributed.sharded_buffer import ShardedBuffer

NUM_ROWS = 7
WIDTH = 3
FULL = torch.arange(1, 1 + NUM_ROWS * WIDTH, dtype=torch.int32).view(NUM_ROWS, WIDTH)


def on_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> ShardedBuffer:
    monkeypatch.setattr(sharded_buffer, "rank", lambda: rank)
    monkeypatch.setattr(sharded_buffer, "world_size", lambda: world_size)
    monkeypatch.setattr(sharded_buffer, "all_reduce_sum", lambda tensor: tensor)
    return ShardedBuffer(NUM_ROWS, WIDTH, torch.device("cpu"))


@pytest.mark.parametrize("before", [1, 2, 3, 9])
@pytest.mark.parametrize("after", [1, 2, 4, 9])
def test_sharded_buffer_load_on_other_world_size_keeps_rows(
    before: int, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [FULL[rank::before] for rank in range(before)]
    found = torch.zeros_like(FULL)
    for rank in range(after):
        table = on_rank(monkeypatch, rank, after)
        table.load(parts)
        assert len(table.rows) <= -(-NUM_ROWS // after)
        found += table.read(torch.arange(NUM_ROWS).numpy())
    assert found.equal(FULL)


def test_sharded_buffer_write_then_read_returns_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = torch.tensor([4, 1, 6]).numpy()
    found = []
    for rank in range(2):
        table = on_rank(monkeypatch, rank, 2)
        table.write(numbers, FULL[numbers].clone())
        found.append(table.read(torch.tensor([6, 0, 4, 1]).numpy()))
    # Rows 4 and 6 are on rank 0 and row 1 on rank 1; nothing was written to row 0.
    assert found[0].equal(torch.stack((FULL[6], 0 * FULL[0], FULL[4], 0 * FULL[1])))
    assert found[1].equal(torch.stack((0 * FULL[6], 0 * FULL[0], 0 * FULL[4], FULL[1])))
