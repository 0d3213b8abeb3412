"""Rows of an update times a matrix, with rows cut anywhere, against the complete product."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from das_ds.distributed.state import Shard
from das_ds.engine.loss_scaler import tf32
from das_ds.softmask import direction_mask
from das_ds.softmask.direction_mask import DirectionMask, build_direction_masks

ROWS = 5
WIDTH = 7
NARROW = 3


def test_blend_row_fragments_of_one_rank_are_combined() -> None:
    """Shards of one rank stand for those of several: what is added up over ranks is added up within it, too."""
    check([0, 17, ROWS * WIDTH])


@pytest.mark.parametrize("cuts", [[0, 35], [0, 14, 35], [0, 1, 35], [0, 15, 17, 19, 35], [0, 6, 8, 34, 35]])
def test_blend_equals_product_at_any_cut(cuts: list[int]) -> None:
    check(cuts)


def build_masks(
    shards: list[Shard], flats: dict[str, torch.Tensor], matrices: dict[str, torch.Tensor]
) -> dict[torch.Tensor, DirectionMask]:
    widths = {name: len(matrix) for name, matrix in matrices.items()}
    return build_direction_masks(shards, flats, widths, matrices.__getitem__, torch.device("cpu"))


def test_build_direction_masks_calls_projector_once_where_needed() -> None:
    flat, elsewhere = (torch.nn.Parameter(torch.zeros(12)) for _ in range(2))
    shards = [Shard("w", flat, 0, 0, 4), Shard("w", flat, 6, 6, 2)]
    asked: list[str] = []

    def projector(name: str) -> torch.Tensor:
        asked.append(name)
        return torch.eye(2)

    build_direction_masks(shards, {"w": flat, "v": elsewhere}, {"w": 2, "v": 3}, projector, torch.device("cpu"))
    assert asked == ["w"]


def check(cuts: list[int]) -> None:
    generator = torch.Generator().manual_seed(5)
    before, step = (torch.randn(ROWS, WIDTH, generator=generator) for _ in range(2))
    other, other_step = (torch.randn(4, NARROW, generator=generator) for _ in range(2))
    masks = {
        "cut": torch.randn(WIDTH, WIDTH, generator=generator),
        "full": torch.randn(NARROW, NARROW, generator=generator),
    }
    # In one flat tensor: a gap, the shards in reverse order with gaps, the other parameter, one that is not masked.
    pieces = [torch.zeros(2)]
    places = 2
    shards = []
    flat = torch.nn.Parameter(torch.empty(2 + ROWS * WIDTH + len(cuts) + 4 * NARROW + 3))
    for first, last in reversed(list(pairwise(cuts))):
        shards.append(Shard("cut", flat, places, first, last - first))
        pieces += [before.flatten()[first:last], torch.zeros(1)]
        places += last - first + 1
    shards.append(Shard("full", flat, places, 0, 4 * NARROW))
    pieces.append(other.flatten())
    shards.append(Shard("free", flat, places + 4 * NARROW, 0, 3))
    pieces.append(torch.zeros(flat.numel() - places - 4 * NARROW))
    flat.data.copy_(torch.cat(pieces))

    mask = build_masks(shards, {"cut": flat, "full": flat}, masks)[flat]
    assert list(mask.chunks()) == [slice(0, flat.numel())]
    old = flat.data.clone()
    for shard in shards:
        moved = {"cut": step.flatten(), "full": other_step.flatten(), "free": torch.ones(3)}[shard.name]
        flat.data[shard.span] += moved[shard.param_span]
    mask.blend_(flat.data, old, slice(0, flat.numel()))

    found = {"cut": torch.zeros(ROWS * WIDTH), "full": torch.zeros(4 * NARROW), "free": torch.zeros(3)}
    for shard in shards:
        found[shard.name][shard.param_span] = flat.data[shard.flat_start :][: shard.numel]
    torch.testing.assert_close(found["cut"].view(ROWS, WIDTH), before + step @ masks["cut"])
    torch.testing.assert_close(found["full"].view(4, NARROW), other + other_step @ masks["full"])
    torch.testing.assert_close(found["free"], torch.ones(3))


def test_build_direction_masks_flat_without_masked_parameters_has_none() -> None:
    flat, other = (torch.nn.Parameter(torch.zeros(4)) for _ in range(2))
    shards = [Shard("w", flat, 0, 0, 4), Shard("free", other, 0, 0, 4)]
    masks = build_masks(shards, {"w": flat, "free": other}, {"w": torch.eye(2)})
    assert list(masks) == [flat]


def test_blend_products_are_in_tf32_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    addmm = torch.addmm

    def watch(*args: torch.Tensor, out: torch.Tensor) -> None:
        seen.append(torch.get_float32_matmul_precision())
        addmm(*args, out=out)

    monkeypatch.setattr(direction_mask, "tf32", lambda device: tf32(torch.device("cuda")))
    monkeypatch.setattr(torch, "addmm", watch)
    flat = torch.nn.Parameter(torch.ones(4))
    mask = build_masks([Shard("w", flat, 0, 0, 4)], {"w": flat}, {"w": torch.eye(2)})[flat]
    mask.blend_(flat.data, torch.zeros(4), slice(0, 4))
    assert seen == ["high"] and torch.get_float32_matmul_precision() == "highest"
