"""Protections of slices of a flat tensor."""

from __future__ import annotations

import pytest
import torch

from das_ds.functional.masks import Segment, SegmentTable
from das_ds.kernels.protection import Protection


def by_unit() -> Protection:
    """Three segments: free, by row and column, by row."""
    values = torch.linspace(0.1, 0.9, 9)
    segments = (
        Segment(0, 4),
        Segment(4, 6, offset=3, num_columns=3, rows=0, columns=4),
        Segment(10, 5, num_columns=5, rows=8),
    )
    return Protection(15, table=SegmentTable(15, segments, values))


@pytest.mark.parametrize("span", [slice(0, 15), slice(4, 10), slice(4, 15), slice(10, 10)])
def test_crop_by_unit_equals_slice_and_shares_values(span: slice) -> None:
    protection = by_unit()
    cropped = protection.crop(span)
    assert cropped.numel == span.stop - span.start
    assert torch.equal(cropped.to_dense(), protection.to_dense()[span])
    assert cropped.table is not None and protection.table is not None
    assert cropped.table.values is protection.table.values


@pytest.mark.parametrize("span", [slice(2, 10), slice(4, 9)])
def test_crop_within_segment_raises(span: slice) -> None:
    found = rf"span: found \[{span.start}, {span.stop}\) of 15 elements, expected one or more complete segments"
    with pytest.raises(ValueError, match=found):
        by_unit().crop(span)


def test_crop_by_parameter_is_a_view() -> None:
    importance = torch.arange(10, dtype=torch.uint8)
    cropped = Protection(10, importance=importance).crop(slice(3, 7))
    importance.fill_(255)
    assert torch.equal(cropped.to_dense(), torch.ones(4))


def test_crop_without_importance_has_none() -> None:
    assert not Protection(10).crop(slice(2, 5)).to_dense().any()
