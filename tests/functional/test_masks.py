"""Masks on shards against full tensors of 1 - I, for every way a partition can cut a parameter."""

from __future__ import annotations

import pytest
import torch

from das_ds.functional.masks import MaskTable
from das_ds.functional.segments import Segment, SegmentTable, cover, importance_of
from das_ds.models.registry import adapter_for
from helpers.reference import full_masks
from helpers.tiny_models import random_importance, tiny_model

ROWS, COLUMNS = 7, 5


@pytest.mark.parametrize("axes", ["rows", "columns", "both"])
def test_every_stretch_equals_a_slice_of_the_full_mask(axes: str) -> None:
    values = torch.rand(ROWS + COLUMNS)
    where = {"rows": 0, "columns": ROWS}
    chosen = where if axes == "both" else {axes: where[axes]}
    rows = values[:ROWS] if "rows" in chosen else torch.zeros(ROWS)
    columns = values[ROWS:] if "columns" in chosen else torch.zeros(COLUMNS)
    whole = torch.tensor([[max(r, c) for c in columns.tolist()] for r in rows.tolist()]).flatten()
    for offset in range(ROWS * COLUMNS):
        for numel in range(1, ROWS * COLUMNS - offset + 1):
            segment = Segment(2, numel, offset, COLUMNS, **chosen)
            found = importance_of(SegmentTable(numel + 5, cover([segment], numel + 5), values))
            assert torch.equal(found[2 : 2 + numel], whole[offset : offset + numel])
            assert not found[:2].any() and not found[2 + numel :].any()


def test_gaps_are_covered_once_and_empty_segments_vanish() -> None:
    given = [Segment(9, 6, 1, 2, rows=0), Segment(3, 0, 0, 4, rows=0), Segment(20, 4, 0, 4, columns=0)]
    covered = cover(given, 30)
    assert [i for segment in covered for i in range(segment.start, segment.stop)] == list(range(30))
    assert [segment for segment in covered if segment.is_protected] == [given[0], given[2]]
    assert cover([], 0) == ()


def test_overlapping_segments_are_a_mistake() -> None:
    with pytest.raises(AssertionError, match="overlaps"):
        cover([Segment(0, 6), Segment(5, 2)], 10)
    with pytest.raises(AssertionError, match="leaves 10"):
        cover([Segment(5, 6)], 10)


@pytest.mark.parametrize("model_type", ["roberta", "bert"])
@pytest.mark.parametrize("readers", [False, True])
@pytest.mark.parametrize("shared_scale", [1.0, 0.25])
def test_table_equals_masks_spelled_out_unit_by_unit(model_type: str, readers: bool, shared_scale: float) -> None:
    model = tiny_model(model_type)
    table = MaskTable(adapter_for(model_type).layout(model), readers=readers, shared_scale=shared_scale)
    for seed in (1, 2):
        importance = random_importance(model, seed)
        table.load(importance)
        for name, scale in full_masks(model, importance, readers=readers, shared_scale=shared_scale).items():
            numel = scale.numel()
            segments = table.segments(name, start=0, offset=0, numel=numel)
            found = 1.0 - importance_of(SegmentTable(numel, tuple(segments), table.values))
            torch.testing.assert_close(found.view_as(scale), scale, rtol=0, atol=1e-7, msg=name)
