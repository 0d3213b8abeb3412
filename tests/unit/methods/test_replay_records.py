"""Replay records: packing keeps bits, and hidden states that are not finite are skipped."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from das_ds.methods.derpp import with_stored_hidden
from das_ds.methods.replay_records import NO_TARGET, RecordLayout, ReplayRecords
from helpers.training import LENGTH, random_batch

HIDDEN = 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [0, 3])
@pytest.mark.parametrize("has_positions", [False, True])
def test_record_layout_round_trip_keeps_bits(dtype: torch.dtype, num_rows: int, has_positions: bool) -> None:
    layout = RecordLayout(
        num_tokens=7, num_positions=4, hidden_size=HIDDEN, dtype=dtype, has_position_ids=has_positions
    )
    rows = ReplayRecords(
        torch.randint(0, 250_000, (num_rows, 7)),
        torch.randint(0, 7, (num_rows, 4)),
        torch.randint(NO_TARGET, 250_000, (num_rows, 4)),
        torch.randn(num_rows, 4, HIDDEN).to(dtype),
        torch.randint(0, 7, (num_rows, 7)) if has_positions else None,
    )
    packed = layout.pack(rows)
    assert packed.shape == (num_rows, layout.width) and packed.dtype == torch.int32
    # 4 bytes a token (and position id), 8 + 2 H a stored position.
    assert 4 * layout.width == 4 * 7 * (1 + has_positions) + 4 * (8 + 2 * HIDDEN)
    found = layout.unpack(packed)
    for field in fields(ReplayRecords):
        mine = getattr(found, field.name)
        theirs = getattr(rows, field.name)
        assert mine is theirs is None or (mine.equal(theirs) and mine.dtype == theirs.dtype), field.name


def test_with_stored_hidden_keeps_predicted_positions() -> None:
    batch = random_batch(4, 0)
    layout = RecordLayout(LENGTH, num_positions=4, hidden_size=HIDDEN, dtype=torch.float16, has_position_ids=False)
    hidden = torch.randn(4, LENGTH, HIDDEN)
    first = batch.predicted[0]
    hidden.view(-1, HIDDEN)[first, 0] = 1e6
    rows = with_stored_hidden(batch, hidden, layout, torch.zeros(4, dtype=torch.float64))
    assert rows.input_ids.equal(batch.corrupted_ids)
    found = 0
    for row, places, targets, answers in zip(range(4), rows.positions, rows.targets, rows.stored_hidden, strict=True):
        predicted = dict(zip(batch.predicted.tolist(), batch.targets.tolist(), strict=True))
        for place, target, answer in zip(places.tolist(), targets.tolist(), answers, strict=True):
            if target == NO_TARGET:
                assert not answer.any()
                continue
            found += 1
            # A hidden state that overflows in 16 bits is skipped.
            assert row * LENGTH + place != first
            assert predicted[row * LENGTH + place] == target and answer.equal(hidden[row, place].half())
    counts = (batch.predicted // LENGTH).bincount(minlength=4)
    assert counts.max() > 4 and found == counts.clamp_max(4).sum() - 1
    assert int(rows.weights.sum()) == found
