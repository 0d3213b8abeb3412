"""The same parity on a GPU: `make test-gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.parity import configs, reference, relative_difference, save_random_importance, steps
from helpers.run_ranks import run_ranks
from helpers.tiny_models import NO_DROPOUT
from helpers.training import train_all

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("stage", range(4))
def test_weights_on_a_gpu_equal_the_reference(stage: int, tmp_path: Path) -> None:
    save_random_importance(tmp_path)
    results = run_ranks(train_all, 1, configs(tmp_path, 1, {"stage": stage}), steps(), NO_DROPOUT)
    for setting, (weights, _) in enumerate(results[0]):
        assert relative_difference(weights, dict(reference(setting).model.named_parameters())) <= 1e-5


@pytest.mark.parametrize(
    ("precision", "stage"), [*(("bf16", stage) for stage in range(4)), *(("fp16", stage) for stage in (1, 2, 3))]
)
def test_16_bit_losses_on_a_gpu_follow_the_reference(precision: str, stage: int, tmp_path: Path) -> None:
    save_random_importance(tmp_path)
    results = run_ranks(train_all, 1, configs(tmp_path, 1, {"stage": stage}, precision), steps(), NO_DROPOUT)
    for setting, (_, lines) in enumerate(results[0]):
        assert [line["loss/mlm"] for line in lines] == pytest.approx(reference(setting).mlm_losses, rel=0.03)
