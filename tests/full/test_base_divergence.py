"""The divergence from the base model at other stages, on other ranks, for decoders and with added tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.base_divergence import expected_divergences
from helpers.continued import DECODER
from helpers.run_ranks import run_ranks
from helpers.runs import run_all, run_stopped_and_continued, small_run

pytestmark = pytest.mark.multirank


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_divergence_at_every_stage_is_that_of_complete_logits(stage: int, tmp_path: Path) -> None:
    values = small_run(
        tmp_path, evaluation={"base_divergence": True}, deepspeed={"zero_optimization": {"stage": stage}}
    )
    values["method"] = {"name": "directions", "num_samples": 40}
    results = run_ranks(run_stopped_and_continued, 2, values, "directions")[0]
    assert results.base_divergences == pytest.approx(expected_divergences(values), rel=1e-4)


def test_divergence_of_decoder_is_that_of_complete_logits(tmp_path: Path) -> None:
    values = small_run(tmp_path, evaluation={"base_divergence": True})
    values["model"] = {"config": DECODER}
    values["method"] = {"name": "ncl"}
    results = run_ranks(run_all, 2, [values])[0][0]
    assert results.base_divergences == pytest.approx(expected_divergences(values), rel=1e-4)


def test_divergence_with_bf16_and_added_tokens_grows(tmp_path: Path) -> None:
    values = small_run(tmp_path, evaluation={"base_divergence": True}, train={"precision": "bf16"})
    values["data"]["add_tokens"] = {"papers": ["zyx"]}
    values["method"] = {"name": "ncl"}
    results = run_ranks(run_all, 2, [values])[0][0]
    assert 0.0 < results.base_divergences[0] < results.base_divergences[1]
