"""Rows of an update times a matrix, with rows cut anywhere, against the whole product."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from das_ds.distributed.state import Shard
from das_ds.softmask.direction_mask import DirectionMask

ROWS, WIDTH, NARROW = 5, 7, 3


def test_what_is_cut_within_rows_is_put_together() -> None:
    """Shards of one rank stand for those of several: what is added up over ranks is added up within it, too."""
    check([0, 17, ROWS * WIDTH])


@pytest.mark.parametrize("cuts", [[0, 35], [0, 14, 35], [0, 1, 35], [0, 15, 17, 19, 35], [0, 6, 8, 34, 35]])
def test_cuts_may_lie_anywhere(cuts: list[int]) -> None:
    check(cuts)


def row_masks(shards: list[Shard], flat_of: dict[str, torch.Tensor], masks: dict[str, torch.Tensor]) -> DirectionMask:
    widths = {name: len(mask) for name, mask in masks.items()}
    return DirectionMask(shards, flat_of, widths, masks.__getitem__, torch.device("cpu"))


def test_a_mask_is_made_once_and_only_where_it_is_needed() -> None:
    flat, elsewhere = (torch.nn.Parameter(torch.zeros(12)) for _ in range(2))
    shards = [Shard("w", flat, 0, 0, 4), Shard("w", flat, 6, 6, 2)]
    asked: list[str] = []

    def mask_of(name: str) -> torch.Tensor:
        asked.append(name)
        return torch.eye(2)

    DirectionMask(shards, {"w": flat, "v": elsewhere}, {"w": 2, "v": 3}, mask_of, torch.device("cpu"))
    assert asked == ["w"]


def check(cuts: list[int]) -> None:
    generator = torch.Generator().manual_seed(5)
    before, step = (torch.randn(ROWS, WIDTH, generator=generator) for _ in range(2))
    other, other_step = (torch.randn(4, NARROW, generator=generator) for _ in range(2))
    masks = {
        "cut": torch.randn(WIDTH, WIDTH, generator=generator),
        "whole": torch.randn(NARROW, NARROW, generator=generator),
    }
    # In one flat tensor: a gap, the shards in reverse order with gaps, the other parameter, one that is not masked.
    pieces, places, shards = [torch.zeros(2)], 2, []
    flat = torch.nn.Parameter(torch.empty(2 + ROWS * WIDTH + len(cuts) + 4 * NARROW + 3))
    for first, last in reversed(list(pairwise(cuts))):
        shards.append(Shard("cut", flat, places, first, last - first))
        pieces += [before.flatten()[first:last], torch.zeros(1)]
        places += last - first + 1
    shards.append(Shard("whole", flat, places, 0, 4 * NARROW))
    pieces.append(other.flatten())
    shards.append(Shard("free", flat, places + 4 * NARROW, 0, 3))
    pieces.append(torch.zeros(flat.numel() - places - 4 * NARROW))
    flat.data.copy_(torch.cat(pieces))

    rows = row_masks(shards, {"cut": flat, "whole": flat}, masks)
    old = rows.remember(flat)
    assert old is not None
    for shard in shards:
        moved = {"cut": step.flatten(), "whole": other_step.flatten(), "free": torch.ones(3)}[shard.name]
        flat.data[shard.span] += moved[shard.param_span]
    rows.mask(flat, old)

    found = {"cut": torch.zeros(ROWS * WIDTH), "whole": torch.zeros(4 * NARROW), "free": torch.zeros(3)}
    for shard in shards:
        found[shard.name][shard.param_span] = flat.data[shard.flat_start :][: shard.numel]
    torch.testing.assert_close(found["cut"].view(ROWS, WIDTH), before + step @ masks["cut"])
    torch.testing.assert_close(found["whole"].view(4, NARROW), other + other_step @ masks["whole"])
    torch.testing.assert_close(found["free"], torch.ones(3))


def test_flat_tensors_without_masked_parameters_are_left_alone() -> None:
    flat, other = (torch.nn.Parameter(torch.zeros(4)) for _ in range(2))
    rows = row_masks([Shard("w", flat, 0, 0, 4)], {"w": flat}, {"w": torch.eye(2)})
    assert rows.remember(other) is None and rows.remember(flat) is not None
