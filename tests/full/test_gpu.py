"""The same parity on a GPU: `make test-gpu`. All precisions of a stage share one process, which takes long to start."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.parity import SETTINGS, configs, reference, relative_difference, save_random_importance, steps
from helpers.run_ranks import run_ranks
from helpers.tiny_models import NO_DROPOUT
from helpers.training import train_all

pytestmark = pytest.mark.gpu

PRECISIONS = {0: ("fp32", "bf16"), **dict.fromkeys((1, 2, 3), ("fp32", "bf16", "fp16"))}
"""ZeRO stage -> precisions that it has."""


@pytest.fixture(scope="module", params=PRECISIONS)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Precision -> weights and logged lines of every setting, at one stage."""
    folder = tmp_path_factory.mktemp(f"stage{request.param}")
    save_random_importance(folder)
    precisions = PRECISIONS[request.param]
    runs = [run for precision in precisions for run in configs(folder, 1, {"stage": request.param}, precision)]
    found = run_ranks(train_all, 1, runs, steps(), NO_DROPOUT)[0]
    size = len(SETTINGS)
    return {precision: found[place * size : (place + 1) * size] for place, precision in enumerate(precisions)}


def test_train_on_a_gpu_weights_equal_the_reference(results: dict[str, list[Any]]) -> None:
    for setting, (weights, _) in enumerate(results["fp32"]):
        assert relative_difference(weights, dict(reference(setting).model.named_parameters())) <= 1e-5


def test_train_on_a_gpu_in_16_bits_losses_follow_the_reference(results: dict[str, list[Any]]) -> None:
    for precision in results.keys() - {"fp32"}:
        for setting, (_, lines) in enumerate(results[precision]):
            expected = pytest.approx(reference(setting).mlm_losses, rel=0.03)
            assert [line["loss/mlm"] for line in lines] == expected, precision
