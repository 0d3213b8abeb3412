"""Masks on shards against full tensors of 1 - I, for every way a partition can cut a parameter."""

from __future__ import annotations

import pytest
import torch

from das_ds.functional import masks
from das_ds.functional.adamw import masked_adamw_
from das_ds.functional.masks import MaskTable, ParameterMask, Piece, fill_gaps, pieces_of_stretch
from das_ds.models.registry import adapter_for
from helpers.reference import full_masks
from helpers.tiny_models import random_importance, tiny_model

ROWS, COLUMNS = 7, 5


def importance_of(pieces: list[Piece], numel: int) -> torch.Tensor:
    """I of every element of a shard, read off by pulling ones back to zeros: new - I * new."""
    new, old = torch.ones(numel), torch.zeros(numel)
    for piece in pieces:
        piece.pull_back_(new[piece.start : piece.stop], old[piece.start : piece.stop])
    return 1.0 - new


@pytest.mark.parametrize("axes", ["rows", "columns", "both"])
@pytest.mark.parametrize("max_elements", [1, 11, 1 << 18])
def test_every_stretch_equals_a_slice_of_the_full_mask(
    axes: str, max_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks, "PIECE_ELEMENTS", max_elements)
    rows = torch.rand(ROWS) if axes != "columns" else None
    columns = torch.rand(COLUMNS) if axes != "rows" else None
    mask = ParameterMask(rows, columns)
    whole = mask.importance().expand(ROWS, COLUMNS).flatten()
    for offset in range(ROWS * COLUMNS):
        for numel in range(1, ROWS * COLUMNS - offset + 1):
            pieces = list(pieces_of_stretch(mask, flat_start=0, offset=offset, numel=numel, num_columns=COLUMNS))
            assert sum(piece.num_rows * piece.num_columns for piece in pieces) == numel
            found = importance_of(pieces, numel)
            torch.testing.assert_close(found, whole[offset : offset + numel], rtol=0, atol=1e-7)


def test_gaps_are_filled_once() -> None:
    mask = ParameterMask(torch.rand(4), None)
    pieces = list(pieces_of_stretch(mask, flat_start=9, offset=1, numel=6, num_columns=2))
    covered = fill_gaps(pieces, 30)
    positions = [i for piece in covered for i in range(piece.start, piece.stop)]
    assert positions == list(range(30))
    assert [i for piece in covered if piece.is_masked for i in range(piece.start, piece.stop)] == list(range(9, 15))


@pytest.mark.parametrize("model_type", ["roberta", "bert"])
@pytest.mark.parametrize("readers", [False, True])
@pytest.mark.parametrize("shared_scale", [1.0, 0.25])
def test_table_equals_masks_spelled_out_unit_by_unit(model_type: str, readers: bool, shared_scale: float) -> None:
    model = tiny_model(model_type)
    importance = random_importance(model)
    layout = adapter_for(model_type).layout(model)
    table = MaskTable(layout, readers=readers, shared_scale=shared_scale)
    table.load(importance)
    expected = full_masks(model, importance, readers=readers, shared_scale=shared_scale)
    for name, scale in expected.items():
        shape = layout.shapes[name]
        found = 1.0 - table.masks[name].importance().expand(shape) if name in table.masks else torch.ones(shape)
        torch.testing.assert_close(found.reshape(scale.shape), scale, rtol=0, atol=1e-7, msg=name)


def test_loading_again_changes_masks_and_pieces_in_place() -> None:
    model = tiny_model()
    layout = adapter_for("roberta").layout(model)
    table = MaskTable(layout, readers=False, shared_scale=1.0)
    name = "roberta.encoder.layer.1.intermediate.dense.weight"
    piece = next(pieces_of_stretch(table.masks[name], flat_start=0, offset=0, numel=48, num_columns=24))
    for seed in (1, 2):
        importance = random_importance(model, seed)
        table.load(importance)
        assert torch.equal(piece.rows, importance["intermediate"][1][:2])  # type: ignore[arg-type]


def test_adamw_without_mask_equals_torch_over_100_steps() -> None:
    torch.manual_seed(0)
    start = torch.randn(1003)
    twin = torch.nn.Parameter(start.clone())
    other = torch.optim.AdamW([twin], lr=3e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, foreach=False)
    param, moments, step = start.clone(), (torch.zeros(1003), torch.zeros(1003)), torch.zeros(())
    for _ in range(100):
        grad = torch.randn(1003)
        twin.grad = grad.clone()
        other.step()
        options = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
        masked_adamw_(param, grad, *moments, step, fill_gaps([], 1003), **options)  # type: ignore[arg-type]
        step += 1
    torch.testing.assert_close(param, twin.data, rtol=1e-5, atol=1e-6)


def test_masked_step_is_a_share_of_the_whole_step() -> None:
    torch.manual_seed(0)
    importance = torch.rand(9)
    importance[0], importance[1] = 0.0, 1.0
    start, grad = torch.randn(45), torch.randn(45)
    options = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    moved = []
    for mask in (None, ParameterMask(importance, None)):
        pieces = list(pieces_of_stretch(mask, flat_start=0, offset=0, numel=45, num_columns=5)) if mask else []
        param = start.clone()
        masked_adamw_(param, grad, torch.zeros(45), torch.zeros(45), torch.zeros(()), fill_gaps(pieces, 45), **options)  # type: ignore[arg-type]
        moved.append((param - start).view(9, 5))
    torch.testing.assert_close(moved[1], moved[0] * (1 - importance)[:, None], rtol=1e-4, atol=2e-7)
    assert torch.equal(moved[1][0], moved[0][0])
    assert torch.equal(moved[1][1], torch.zeros(5))
