"""The reservoir against a loop, its law, and the spread of positions against counting."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from das_ds.functional.sampling import NOT_STORED, append_zero_row, evenly_spaced, final_writes, reservoir_slots


def stored(num_samples: int, capacity: int, chunk: int, seed: int) -> list[int]:
    """Numbers of the samples in each slot after a stream, taken in chunks."""
    uniforms = np.random.default_rng(seed).random(num_samples)
    slots = np.full(capacity, NOT_STORED)
    for first in range(0, num_samples, chunk):
        found = reservoir_slots(first, uniforms[first : first + chunk], capacity)
        last = final_writes(found)
        assert len(set(found[last])) == len(last)
        slots[found[last]] = first + last
    return list(slots)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_reservoir_slots_any_chunks_equal_loop(chunk: int) -> None:
    uniforms = np.random.default_rng(0).random(64)
    expected = list[int]()
    for number, u in enumerate(uniforms):
        slot = int(u * (number + 1))
        if number < 5:
            expected.append(number)
        elif slot < 5:
            expected[slot] = number
    assert stored(64, 5, chunk, 0) == expected


def test_reservoir_slots_keep_samples_equally_often() -> None:
    counts = np.zeros(30)
    for seed in range(3000):
        counts[stored(30, 6, 10, seed)] += 1
    # 600 times each, with a standard deviation of 22.
    assert np.abs(counts - 600).max() < 100


def test_reservoir_slots_partial_buffer_has_empty_slots() -> None:
    assert stored(3, 5, 2, 0) == [0, 1, 2, NOT_STORED, NOT_STORED]


def test_evenly_spaced_all_or_spread_over_sequence() -> None:
    # Rows of 10 tokens that predict 2, none, 6 and 3.
    predicted = torch.tensor([1, 7, 20, 21, 22, 25, 26, 29, 30, 34, 38])
    offsets = torch.tensor([0.9, 0.9, 0.9, 0.0], dtype=torch.float64)
    indices, exists = evenly_spaced(predicted, 4, 10, 3, offsets)
    found = [append_zero_row(predicted)[row][mask].tolist() for row, mask in zip(indices, exists, strict=True)]
    # Of six, those at floor(0.9 * 2), floor(1.9 * 2), floor(2.9 * 2).
    assert found == [[1, 7], [], [21, 25, 29], [30, 34, 38]]


def test_evenly_spaced_without_positions() -> None:
    indices, exists = evenly_spaced(torch.zeros(0, dtype=torch.int64), 2, 10, 4, torch.rand(2).double())
    assert not exists.any() and not append_zero_row(torch.zeros(0, 3))[indices].any()


def test_evenly_spaced_positions_equally_likely() -> None:
    num_rows = 7000
    count = 3
    predicted = torch.arange(num_rows)[:, None] * 10 + torch.arange(7)
    offsets = torch.rand(num_rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    indices, exists = evenly_spaced(predicted.flatten(), num_rows, 10, count, offsets)
    assert exists.all()
    chosen = predicted.flatten()[indices] % 10
    assert (chosen.diff(dim=1) > 0).all()
    counts = chosen.flatten().bincount(minlength=7)
    assert (counts - num_rows * count / 7).abs().max() < 200
