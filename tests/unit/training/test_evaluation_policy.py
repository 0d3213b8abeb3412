"""Best step, early stopping and limits on forgetting, from losses made by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from das_ds.checkpoint.manifest import DomainEnd, DomainEvaluation, RunState
from das_ds.config import RunConfig
from das_ds.errors import TrainingError
from das_ds.training.evaluation_policy import EvaluationPolicy, check_finite

LOSS_MATRIX = [[6.0, 5.5, 3.0], [4.0, 5.4, 3.05]]
"""Before training, and after acl: losses of acl, pubmed and general."""


def config(method: str = "ncl", faults: dict[str, Any] | None = None, **evaluation: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "output_dir": "runs/papers",
            "model": {"name_or_path": "roberta-base"},
            "domains": [{"name": name, "train": ["unused.txt"]} for name in ("acl", "pubmed")],
            "general": {"name": "general", "valid": ["unused.txt"]},
            "train": {"steps_per_domain": 10},
            "method": {"name": method},
            "evaluation": {"every_steps": 2, **evaluation},
            "faults": {"max_forgetting": faults},
        }
    )


def second_domain(run: RunConfig, losses: list[tuple[float, float, float]]) -> RunState:
    """A run within pubmed, evaluated every two steps: losses of (acl, pubmed, general)."""
    policy = EvaluationPolicy(run)
    state = RunState(phase="train", domains_done=1, global_step=10, loss_matrix=LOSS_MATRIX)
    records = [policy.start(run.stages[1], state, LOSS_MATRIX[1])]
    for number, row in enumerate(losses, start=1):
        named = dict(zip(("acl", "pubmed", "general"), row, strict=True))
        step = 2 * number
        records.append(DomainEvaluation(domain="pubmed", step=step, global_step=10 + step, losses=named))
    earlier = DomainEvaluation(domain="acl", step=10, global_step=10, losses={"acl": 0.1, "general": 9.0})
    return state.model_copy(update={"evaluations": [earlier, *records]})


def own(losses: list[float]) -> list[tuple[float, float, float]]:
    return [(4.0, loss, 3.05) for loss in losses]


def test_domain_itself_earlier_ones_and_general_are_evaluated() -> None:
    run = config()
    policy = EvaluationPolicy(run)
    assert [policy.corpora(stage) for stage in run.stages] == [["acl", "general"], ["acl", "pubmed", "general"]]
    pool = config("pool")
    assert EvaluationPolicy(pool).corpora(pool.stages[0]) == ["acl", "pubmed", "general"]
    start = second_domain(run, []).evaluations[-1]
    assert start == DomainEvaluation(
        domain="pubmed", step=0, global_step=10, losses={"acl": 4.0, "pubmed": 5.4, "general": 3.05}
    )


def test_evaluation_is_due_every_few_steps_and_after_the_last() -> None:
    policy = EvaluationPolicy(config())
    assert [step for step in range(8) if policy.is_due(step, 7)] == [2, 4, 6, 7]
    without = EvaluationPolicy(config().model_copy(update={"evaluation": RunConfig.model_fields["evaluation"].default}))
    assert not without.is_enabled and not without.is_due(7, 7)


def test_best_step_is_the_first_with_the_lowest_own_loss() -> None:
    run = config()
    policy = EvaluationPolicy(run)
    assert policy.best_step(run.stages[1], second_domain(run, [])) is None
    assert policy.best_step(run.stages[1], second_domain(run, own([5.0, 4.5, 4.7, 4.5]))) == 4
    pool = config("pool")
    rows = [{"acl": 5.0, "pubmed": 5.0, "general": 1.0}, {"acl": 5.5, "pubmed": 4.0, "general": 2.0}]
    records = [
        DomainEvaluation(domain="pool", step=2 * (number + 1), global_step=number, losses=row)
        for number, row in enumerate(rows)
    ]
    state = RunState(phase="train", loss_matrix=LOSS_MATRIX[:1], evaluations=records)
    # The mean over its domains falls from 5.0 to 4.75.
    assert EvaluationPolicy(pool).best_step(pool.stages[0], state) == 4


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([5.0], None),
        ([5.0, 5.1], None),
        ([5.0, 5.1, 5.2], "early_stopping"),
        # Improved by less than min_delta, twice in a row, though lower and lower.
        ([5.0, 4.95, 4.91], "early_stopping"),
        # Together more than min_delta below the last improvement.
        ([5.0, 4.95, 4.89], None),
        ([5.0, 5.1, 4.5, 4.6], None),
        ([5.0, 5.1, 4.5, 4.6, 4.7], "steps"),
        ([5.0, 4.8, 4.6, 4.4, 4.2], "steps"),
    ],
)
def test_early_stopping_counts_evaluations_without_improvement(losses: list[float], expected: str | None) -> None:
    run = config(early_stopping={"patience": 2, "min_delta": 0.1})
    assert EvaluationPolicy(run).end_reason(run.stages[1], second_domain(run, own(losses))) == expected


def test_domain_takes_all_steps_without_early_stopping() -> None:
    run = config()
    policy = EvaluationPolicy(run)
    state = second_domain(run, own([5.0, 5.1, 5.2, 5.3]))
    assert policy.end_reason(run.stages[1], state) is None
    state = second_domain(run, own([5.0, 5.1, 5.2, 5.3, 5.4]))
    end = DomainEnd(domain="pubmed", reason="steps", step=10, best_step=2, model_step=10)
    assert policy.end(run.stages[1], state) == end
    best = EvaluationPolicy(config(continue_from="best"))
    assert best.end(run.stages[1], state) == end.model_copy(update={"model_step": 2})


LIMITS = {"general": 0.1, "earlier": 0.2}


def test_limits_compare_general_with_the_start_and_earlier_domains_with_what_was_learned() -> None:
    run = config(faults=LIMITS)
    policy = EvaluationPolicy(run)
    state = second_domain(run, [(4.19, 5.0, 3.14), (4.21, 5.0, 3.16)])
    kept, exceeded = state.evaluations[-2:]
    assert policy.exceeded(run.stages[1], state, kept) == []
    assert policy.exceeded(run.stages[1], state, exceeded) == [
        "pubmed, step 4: loss of acl is 0.2100 nats above that right after it was learned, allowed: 0.2 "
        "(faults.max_forgetting.earlier)",
        "pubmed, step 4: loss of general is 0.1100 nats above that at the start of the domain, allowed: 0.1 "
        "(faults.max_forgetting.general)",
    ]


@pytest.mark.parametrize(("faults", "corpus"), [({"general": 0.1}, "general"), ({"earlier": 0.2}, "acl")])
def test_only_given_limits_count(faults: dict[str, Any], corpus: str) -> None:
    run = config(faults=faults)
    state = second_domain(run, [(9.0, 9.0, 9.0)])
    (problem,) = EvaluationPolicy(run).exceeded(run.stages[1], state, state.evaluations[-1])
    assert f"loss of {corpus} is" in problem


FORGETS_LATER = [(4.0, 5.0, 3.0), (4.0, 4.8, 3.0), (5.0, 4.6, 3.0)]


@pytest.mark.parametrize(
    ("action", "continue_from", "losses", "expected"),
    [
        ("stop", "last", FORGETS_LATER, ("max_forgetting", 6, 4, 6)),
        ("stop", "best", FORGETS_LATER, ("max_forgetting", 6, 4, 4)),
        ("rollback", "last", FORGETS_LATER, ("max_forgetting", 6, 4, 4)),
        # The last that kept the limits is not the best of them.
        ("rollback", "last", [(4.0, 5.0, 3.0), (4.0, 5.1, 3.0), (5.0, 4.6, 3.0)], ("max_forgetting", 6, 2, 4)),
        ("rollback", "best", [(4.0, 5.0, 3.0), (4.0, 5.1, 3.0), (5.0, 4.6, 3.0)], ("max_forgetting", 6, 2, 2)),
        # None kept them: the domain ends where it began.
        ("rollback", "best", [(5.0, 4.6, 3.0)], ("max_forgetting", 2, None, 0)),
        ("rollback", "last", [(5.0, 4.6, 3.0)], ("max_forgetting", 2, None, 0)),
    ],
)
def test_exceeded_limit_ends_the_domain(
    action: str, continue_from: str, losses: list[Any], expected: tuple[Any, ...]
) -> None:
    run = config(faults={**LIMITS, "action": action}, continue_from=continue_from)
    reason, step, best_step, model_step = expected
    end = EvaluationPolicy(run).end(run.stages[1], second_domain(run, losses))
    assert end == DomainEnd(domain="pubmed", reason=reason, step=step, best_step=best_step, model_step=model_step)


def test_warning_neither_ends_the_domain_nor_decides_on_the_best_step() -> None:
    run = config(faults={**LIMITS, "action": "warn"})
    policy = EvaluationPolicy(run)
    state = second_domain(run, FORGETS_LATER)
    assert policy.end_reason(run.stages[1], state) is None
    assert policy.best_step(run.stages[1], state) == 6
    assert policy.exceeded(run.stages[1], state, state.evaluations[-1])


def test_loss_that_is_not_finite_raises() -> None:
    stage = config().stages[1]
    check_finite(stage, 4, {"acl": 1.0})
    with pytest.raises(TrainingError, match=r"^held-out loss of acl at step 4 of pubmed: found nan, expected a finite"):
        check_finite(stage, 4, {"general": 1.0, "acl": math.nan})
