"""Masks on shards against full tensors of 1 - I, for every way a partition can cut a parameter."""

from __future__ import annotations

import pytest
import torch

from das_ds.functional.masks import (
    MaskTable,
    Segment,
    SegmentTable,
    apply_exponent,
    build_lookup_tables,
    dense_importance,
    fill_gaps,
)
from das_ds.functional.units import UnitValues
from das_ds.models.architectures.registry import spec_for
from helpers.reference import full_masks
from helpers.tiny_models import CONFIGS, random_importance, tiny_model

ROWS = 7
COLUMNS = 5


@pytest.mark.parametrize("axes", ["rows", "columns", "both"])
def test_segments_of_any_range_equal_slice_of_full_mask(axes: str) -> None:
    values = torch.rand(ROWS + COLUMNS)
    where = {"rows": 0, "columns": ROWS}
    chosen = where if axes == "both" else {axes: where[axes]}
    rows = values[:ROWS] if "rows" in chosen else torch.zeros(ROWS)
    columns = values[ROWS:] if "columns" in chosen else torch.zeros(COLUMNS)
    full = torch.tensor([[max(r, c) for c in columns.tolist()] for r in rows.tolist()]).flatten()
    for offset in range(ROWS * COLUMNS):
        for numel in range(1, ROWS * COLUMNS - offset + 1):
            segment = Segment(2, numel, offset, COLUMNS, **chosen)
            found = dense_importance(SegmentTable(numel + 5, fill_gaps([segment], numel + 5), values))
            assert torch.equal(found[2 : 2 + numel], full[offset : offset + numel])
            assert not found[:2].any() and not found[2 + numel :].any()


def test_fill_gaps_covers_gaps_and_drops_empty_segments() -> None:
    given = [Segment(9, 6, 1, 2, rows=0), Segment(3, 0, 0, 4, rows=0), Segment(20, 4, 0, 4, columns=0)]
    covered = fill_gaps(given, 30)
    assert [i for segment in covered for i in range(segment.start, segment.stop)] == list(range(30))
    assert [segment for segment in covered if segment.is_protected] == [given[0], given[2]]
    assert fill_gaps([], 0) == ()


def test_fill_gaps_overlapping_segments_raise() -> None:
    with pytest.raises(AssertionError, match="overlaps"):
        fill_gaps([Segment(0, 6), Segment(5, 2)], 10)
    with pytest.raises(AssertionError, match="leaves 10"):
        fill_gaps([Segment(5, 6)], 10)


@pytest.mark.parametrize("model_type", ["roberta", "bert"])
@pytest.mark.parametrize("include_consumers", [False, True])
@pytest.mark.parametrize("unowned_update_scale", [1.0, 0.25])
def test_mask_table_equals_reference_masks(
    model_type: str, include_consumers: bool, unowned_update_scale: float
) -> None:
    model = tiny_model(model_type)
    table = MaskTable(
        spec_for(model_type).layout(model),
        include_consumers=include_consumers,
        unowned_update_scale=unowned_update_scale,
    )
    for seed in (1, 2):
        importance = random_importance(model, seed)
        table.load(importance)
        for name, scale in full_masks(
            model, importance, include_consumers=include_consumers, unowned_update_scale=unowned_update_scale
        ).items():
            numel = scale.numel()
            segments = table.segments(name, start=0, offset=0, numel=numel)
            found = 1.0 - dense_importance(SegmentTable(numel, tuple(segments), table.values))
            torch.testing.assert_close(found.view_as(scale), scale, rtol=0, atol=1e-7, msg=name)


HEAD_WIDTH = 8
SHARERS = 3
INNER = {"llama": 40, "phi3": 40, "mixtral": 16}


def importance_by_hand(
    model_type: str, name: str, place: tuple[int, ...], importance: UnitValues, include_consumers: bool
) -> float | None:
    """Importance of one weight, read off the architecture's description; None: no unit owns it.

    Args:
        model_type: llama (separate maps), phi3 (fused) or mixtral (experts), all with grouped-query attention.
        name: parameter of layer `name.split(".")[2]`.
        place: (row,), (row, column) or (expert, row, column).
        importance: group -> (L, U).
        include_consumers: columns of the down projection are protected too.
    """
    if ".layers." not in name or "norm" in name or "mlp.gate." in name:
        return None
    row, column = place[-2:] if len(place) > 1 else (place[0], -1)
    head, intermediate, output = (importance[g][int(name.split(".")[2])].tolist() for g in importance)
    own = INNER[model_type] * (place[0] if len(place) == 3 else 0)
    num_queries = len(head) * HEAD_WIDTH

    def shared(key_value_row: int) -> float:
        first = key_value_row // HEAD_WIDTH * SHARERS
        return max(head[first : first + SHARERS])

    if "q_proj" in name or ("qkv_proj" in name and row < num_queries):
        return head[row // HEAD_WIDTH]
    if "qkv_proj" in name:
        return shared((row - num_queries) % (len(head) // SHARERS * HEAD_WIDTH))
    if "k_proj" in name or "v_proj" in name:
        return shared(row)
    if "o_proj" in name:
        return None if column < 0 else head[column // HEAD_WIDTH]
    if "gate" in name or "up" in name:
        return intermediate[own + row % INNER[model_type]]
    assert "down_proj" in name
    return max(output[row], intermediate[own + column] if include_consumers and column >= 0 else 0.0)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "mixtral"])
@pytest.mark.parametrize("include_consumers", [False, True])
def test_mask_table_equals_loop_over_weights(model_type: str, include_consumers: bool) -> None:
    model = tiny_model(model_type)
    layout = spec_for(model_type).layout(model)
    table = MaskTable(layout, include_consumers=include_consumers, unowned_update_scale=0.75)
    importance = random_importance(model)
    table.load(importance)
    for name, parameter in model.named_parameters():
        if ".layers.0." in name:
            # Both layers are made by the same code; one of them and everything outside is enough.
            continue
        places = torch.cartesian_prod(*(torch.arange(size) for size in parameter.shape)).view(-1, parameter.dim())
        by_hand = [
            importance_by_hand(model_type, name, tuple(p), importance, include_consumers) for p in places.tolist()
        ]
        full = torch.tensor([0.25 if value is None else value for value in by_hand])
        numel = len(full)
        for offset, length in [(0, numel), (1, numel - 2), (numel // 3, numel // 2), (numel // 2 + 1, 5)]:
            segments = table.segments(name, start=3, offset=offset, numel=length)
            found = dense_importance(SegmentTable(length + 4, fill_gaps(segments, length + 4), table.values))
            assert torch.equal(found[3 : 3 + length], full[offset : offset + length]), name
            assert not found[:3].any() and not found[3 + length :].any()


@pytest.mark.parametrize("groups", [["head"], ["intermediate", "unowned"], []])
@pytest.mark.parametrize("include_consumers", [False, True])
def test_mask_table_units_outside_groups_are_free(groups: list[str], include_consumers: bool) -> None:
    model = tiny_model()
    layout = spec_for("roberta").layout(model)
    table = MaskTable(
        layout, include_consumers=include_consumers, unowned_update_scale=0.25, groups=groups, exponent=3.0
    )
    importance = random_importance(model)
    table.load(importance)
    masked = {
        group: 1 - (1 - values) ** 3 if group in groups else torch.zeros_like(values)
        for group, values in importance.items()
    }
    for name, scale in full_masks(
        model, masked, include_consumers=include_consumers, unowned_update_scale=0.25
    ).items():
        segments = fill_gaps(table.segments(name, start=0, offset=0, numel=scale.numel()), scale.numel())
        found = 1.0 - dense_importance(SegmentTable(scale.numel(), segments, table.values))
        torch.testing.assert_close(found.view_as(scale), scale, rtol=0, atol=1e-6, msg=name)


def test_apply_exponent_keeps_zero_and_one() -> None:
    importance = torch.tensor([0.0, 0.3, 1.0])
    assert apply_exponent(importance, 1.0) is importance
    assert apply_exponent(importance, 2.0).tolist() == [0.0, pytest.approx(0.51), 1.0]
    assert apply_exponent(importance, 0.5).tolist() == [0.0, pytest.approx(1 - 0.7**0.5), 1.0]


def test_build_lookup_tables_by_hand() -> None:
    owners = {"query": "head", "inner": "intermediate", "embedding": "unowned"}
    tables = build_lookup_tables(
        owners, groups=["head", "unowned"], unowned_update_scale=0.5, exponent=2.0, num_levels=10
    )
    assert tables is not None
    # (1 - I)^2 leaves 0.81, 0.64, ... of the update, and half of that where no unit owns the weight.
    assert tables["query"].tolist() == [0, 2, 4, 5, 6, 8, 8, 9, 10, 10, 10]
    assert tables["inner"].tolist() == [0] * 11
    assert tables["embedding"].tolist() == [5, 6, 7, 8, 8, 9, 9, 10, 10, 10, 10]


def test_build_lookup_tables_identity_is_none() -> None:
    owners = {"query": "head", "embedding": "unowned"}
    assert build_lookup_tables(owners, groups=None, unowned_update_scale=1.0, exponent=1.0, num_levels=255) is None
    assert (
        build_lookup_tables(owners, groups=["head", "unowned"], unowned_update_scale=1.0, exponent=1.0, num_levels=255)
        is None
    )
    for group, free in (("head", "embedding"), ("unowned", "query")):
        tables = build_lookup_tables(owners, groups=[group], unowned_update_scale=1.0, exponent=1.0, num_levels=255)
        assert tables is not None and not tables[free].any()


@pytest.mark.parametrize("model_type", CONFIGS)
def test_layout_parameter_has_one_owning_group(model_type: str) -> None:
    layout = spec_for(model_type).layout(tiny_model(model_type))
    pairs = {(item.parameter, item.group) for item in layout.ownerships if not item.consumer}
    assert len(pairs) == len({name for name, _ in pairs})
    shared = {name: "unowned" for name in layout.shapes if name not in dict(pairs)}
    assert layout.owners == {**dict(pairs), **shared} and shared
