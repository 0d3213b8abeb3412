"""CPU tiles and Triton tiles: every element once, and the importance of each where the table says."""

from __future__ import annotations

import pytest
import torch

from das_ds.functional.masks import Segment
from das_ds.kernels import cpu_tiles, tiles
from das_ds.kernels.protection import Protection
from das_ds.kernels.tiles import SEGMENT_FIELDS
from helpers.protections import KINDS, new_seed, random_protection

NUMEL = 3001


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("most", [1, 7, 64, 1000, 1 << 18])
def test_cpu_tiles_cover_tensor_with_its_importance(kind: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_tiles, "CPU_TILE_ELEMENTS", most)
    seed = new_seed()
    protection = random_protection(kind, NUMEL, torch.Generator().manual_seed(seed))
    found = torch.full((NUMEL,), torch.nan)
    position = 0
    for tile in protection.cpu_tiles:
        assert tile.start == position and 0 < len(tile) <= most, seed
        position = tile.stop
        new = torch.zeros(len(tile))
        old = torch.ones(len(tile))
        protection.lerp_toward_(new, old, tile, protection.scratch())
        found[tile.start : tile.stop] = new
    assert position == NUMEL
    torch.testing.assert_close(found, protection.to_dense(), rtol=0, atol=1e-7, msg=f"seed {seed}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile_elements", [16, 128, 4096])
def test_triton_tiles_cover_every_element_once(kind: str, tile_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", tile_elements)
    seed = new_seed()
    protection = random_protection(kind, NUMEL, torch.Generator().manual_seed(seed))
    table = protection.triton_tiles(torch.device("cpu"))
    counts = torch.zeros(NUMEL, dtype=torch.long)
    for tile, number in zip(table.tile.tolist(), table.segment.tolist(), strict=True):
        segment = Segment(**dict(zip(SEGMENT_FIELDS, table.segments[number].tolist(), strict=True)))
        assert segment == protection.segments[number]
        begin = max(segment.start, tile * tile_elements)
        end = min(segment.stop, (tile + 1) * tile_elements)
        assert begin < end, f"seed {seed}: a tile without elements"
        counts[begin:end] += 1
    assert bool((counts == 1).all()), seed
    border = min(tile_elements, NUMEL - 1)
    for start, stop in ((0, NUMEL), (0, 1), (NUMEL - 1, NUMEL), (border - 1, border + 1), (700, 1900)):
        meant = {element // tile_elements for element in range(start, stop)}
        found = [entry for entry, tile in enumerate(table.tile.tolist()) if tile in meant]
        assert list(table.entries(start, stop)) == found, seed


def test_cpu_tiles_in_requires_complete_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_tiles, "CPU_TILE_ELEMENTS", 100)
    protection = Protection(250)
    assert [(w.start, w.stop) for w in protection.cpu_tiles] == [(0, 100), (100, 200), (200, 250)]
    assert protection.cpu_tiles_in(100, 250) == protection.cpu_tiles[1:]
    for start, stop in ((0, 50), (50, 100), (0, 251), (250, 300)):
        with pytest.raises(ValueError, match=rf"found \[{start}, {stop}\) of 250 elements, expected .*complete tiles"):
            protection.cpu_tiles_in(start, stop)


def test_cpu_tiles_of_empty_tensor_are_empty() -> None:
    assert Protection(0).cpu_tiles == ()
