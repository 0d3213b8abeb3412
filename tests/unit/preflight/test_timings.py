"""The estimate of a run's time, against sums written out."""

from __future__ import annotations

import pytest

from das_ds.config import RunConfig
from das_ds.preflight.rehearsal import NUM_STEPS, describe_estimate, short_config
from das_ds.preflight.timings import (
    LoopTiming,
    PhaseTiming,
    Rehearsal,
    StageLength,
    StepsTiming,
    TimeEstimate,
    estimate_time,
)
from helpers.configs import base_values


def test_loop_without_its_first_batch_is_extrapolated() -> None:
    phase = PhaseTiming(10.0, {"a": LoopTiming(100, [3.0, 1.0, 1.0]), "b": LoopTiming(1, [2.0]), "c": LoopTiming(0)})
    assert phase.fixed_seconds == 10.0 - 5.0 - 2.0
    assert phase.full_seconds == 3.0 + 100 * 1.0 + 1 * 2.0


def test_estimate_later_stages_take_what_the_second_takes() -> None:
    rehearsal = Rehearsal(
        head_warmup=StepsTiming(9.0, [5.0, 2.0, 2.0]),
        evaluations=[PhaseTiming(4.0, {"evaluate a": LoopTiming(10, [1.0, 0.5, 0.5])})] * 3,
        before=[PhaseTiming(0.0), PhaseTiming(7.0, {"x": LoopTiming(20, [1.0, 1.0])})],
        steps=[StepsTiming(10.0, [4.0, 1.0, 1.0]), StepsTiming(12.0, [4.0, 2.0, 2.0])],
        after=[PhaseTiming(3.0), PhaseTiming(6.0)],
        save_seconds=0.25,
    )
    stages = [StageLength("a", 100, 6, 2), StageLength("b", 200, 12, 4), StageLength("c", 300, 18, 0)]
    estimate = estimate_time(rehearsal, stages, num_eval_batches=30, num_head_steps=50)
    assert estimate.steps == 50 * 2.0 + 100 * 1.0 + (200 + 300) * 2.0
    # Before training and after each of three stages; 2 seconds are not of batches.
    assert estimate.evaluation == 4 * (2.0 + 30 * 0.5) + 36 * 0.5
    # Of the steps' phases what is no step: 4 seconds each.
    assert estimate.between == (0.0 + 3.0 + 4.0) + 2 * ((5.0 + 20 * 1.0) + 6.0 + 4.0)
    assert estimate.checkpoints == 6 * 0.25
    assert estimate.step_seconds == {"a": 1.0, "b": 2.0}
    assert estimate.total == estimate.steps + estimate.evaluation + estimate.between + estimate.checkpoints


def test_estimate_in_words_has_time_and_cost() -> None:
    estimate = TimeEstimate(7200.0, 600.0, 0.5, 0.0, {"acl": 0.61234, "ai": 0.74})
    assert describe_estimate(estimate, 8, "cuda") == (
        "2h10m (17.3 GPU hours): steps 2h00m, evaluation 10m00s; a step takes 0.612 s in acl, 0.74 s in ai"
    )


@pytest.mark.parametrize(("method", "num_domains", "num_steps"), [("das", 2, NUM_STEPS), ("pool", 3, 3)])
def test_short_config_has_few_steps_and_nothing_that_ends_them(method: str, num_domains: int, num_steps: int) -> None:
    values = {
        "domains": [{"name": name, "train": ["a.txt"], "epochs": 3.0} for name in "abc"],
        "general": {"name": "general", "valid": ["b.txt"]},
        "method": {"name": method},
        "evaluation": {"every_steps": 5, "batch_size": 2, "early_stopping": {"patience": 1}},
        "faults": {"max_forgetting": {"general": 0.1}},
        "tracking": ["wandb"],
    }
    config = RunConfig.model_validate({**base_values("unused"), **values})
    short = short_config(config)
    assert [domain.steps for domain in short.domains] == [num_steps] * num_domains
    assert short.evaluation.every_steps is None and short.evaluation.early_stopping is None
    assert short.evaluation.batch_size == 2 and short.faults.max_forgetting is None and short.tracking == []
    assert len(short.stages) == (1 if method == "pool" else 2)
