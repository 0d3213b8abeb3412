"""Weights after training under masks of directions, against float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.masked_training import Form, masked_config, train_masked, train_plainly
from helpers.parity import relative_difference
from helpers.run_ranks import run_ranks
from helpers.tiny_models import NO_DROPOUT, tiny_model


def check_masked_training(folder: Path, world_size: int, zero: dict[str, Any], precisions: tuple[str, ...]) -> None:
    """Both forms, on real ranks, in fp32 and in other precisions."""
    forms: tuple[Form, ...] = ("gradient", "update")
    runs = [
        (masked_config(folder, world_size, zero, precision), form)
        for precision in ("fp32", *precisions)
        for form in forms
    ]
    found = run_ranks(train_masked, world_size, runs)[0]
    start = {name: value.detach().double() for name, value in tiny_model(**NO_DROPOUT).named_parameters()}
    for (config, form), (weights, norms) in zip(runs, found, strict=True):
        true_weights, true_norms = train_plainly(form)
        if config.train.precision == "fp32":
            assert relative_difference(weights, true_weights) <= 2e-5
            assert norms == pytest.approx(true_norms, rel=1e-5)
            continue
        # The gradient of a key's bias is rounding alone.
        mine, theirs = (
            torch.cat([(after[name] - start[name]).flatten().double() for name in start if "key.bias" not in name])
            for after in (weights, true_weights)
        )
        assert torch.nn.functional.cosine_similarity(mine, theirs, dim=0) > 0.97
        assert norms == pytest.approx(true_norms, rel=0.05)
