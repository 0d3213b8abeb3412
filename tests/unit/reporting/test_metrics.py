"""Means, paired differences and the matched baseline, against values computed by hand."""

from __future__ import annotations

import pytest

from das_ds.reporting.metrics import (
    FORGETTING,
    GENERAL_DRIFT,
    LOSS_AFTER_LEARNING,
    LOSS_AFTER_LEARNING_LATER,
    available_metrics,
    baseline_sweep,
    estimate_metric,
    forgetting_vs_matched_baseline,
    matched_baseline_forgetting,
    matched_pairs,
    metric_difference,
    metric_values,
)
from helpers.comparisons import comparison, group, interval_of_two, pooled

NCL = group("ncl", [(3.0, 0.9), (3.2, 0.7)], train__learning_rate="1e-3")
SLOW = group("ncl slow", [(4.0, 0.5), (4.2, 0.3)], train__learning_rate="3e-4")
REPLAY = group("ncl replay", [(3.4, 0.1), (3.6, 0.1)], method__replay__share="0.1")
DAS = group("das", [(3.5, 0.6), (3.7, 0.3), (3.0, 0.0)], train__learning_rate="1e-3")


def test_estimate_metric_missing_values_are_skipped() -> None:
    found = estimate_metric(NCL, FORGETTING)
    assert found is not None
    assert (found.mean, found.low, found.high, found.num_seeds) == pytest.approx((0.8, *interval_of_two(0.9, 0.7), 2))
    assert metric_values(DAS, LOSS_AFTER_LEARNING) == pytest.approx({0: 3.5, 1: 3.7, 2: 3.0})
    assert estimate_metric(pooled("pool", [2.5]), FORGETTING) is None


def test_metric_difference_pairs_common_seeds() -> None:
    found = metric_difference(DAS, NCL, FORGETTING)
    assert found is not None
    low, high = interval_of_two(-0.3, -0.4)
    assert (found.mean, found.low, found.high, found.num_seeds) == pytest.approx((-0.35, low, high, 2))
    assert found.p_value == 0.5
    third = DAS.model_copy(update={"runs": DAS.runs[2:]})
    assert metric_difference(third, NCL, FORGETTING) is None
    assert metric_difference(pooled("pool", [2.5]), NCL, FORGETTING) is None


def test_baseline_sweep_differs_only_in_train_keys() -> None:
    everything = comparison(NCL, SLOW, REPLAY, DAS)
    assert [found.label for found in baseline_sweep(everything)] == ["ncl", "ncl slow"]
    # Seed 0: halfway between 0.9 and 0.5; seed 1: halfway between 0.7 and 0.3; seed 2 has no line.
    found = forgetting_vs_matched_baseline(everything, DAS)
    assert found is not None
    assert (found.mean, found.num_seeds) == pytest.approx((((0.6 - 0.7) + (0.3 - 0.5)) / 2, 2))
    assert matched_baseline_forgetting(everything, DAS) == pytest.approx(0.6)


def test_baseline_sweep_leaves_out_layer_wise_rates() -> None:
    key = "train__layer_lr_decay"
    naive = group("ncl", [(3.0, 0.9)], train__learning_rate="1e-3", **{key: "1"})
    decayed = group("ncl, layer decay", [(3.1, 0.2)], train__learning_rate="1e-3", **{key: "0.8"})
    assert [found.label for found in baseline_sweep(comparison(naive, decayed))] == ["ncl"]


def test_matched_baseline_dominated_rates_do_not_count() -> None:
    # At this rate it learns less and forgets more than at another: the line from 0.9 to 0.5 stays.
    too_fast = group("ncl fast", [(3.5, 2.0)], train__learning_rate="1e-2")
    das = group("das", [(3.5, 0.6)], train__learning_rate="1e-3")
    everything = comparison(NCL, SLOW, too_fast, das)
    assert "ncl fast" in [found.label for found in baseline_sweep(everything)]
    assert matched_pairs(everything, das) == {0: pytest.approx((0.6, 0.7))}


def test_matched_baseline_first_domain_does_not_count() -> None:
    """Forgetting comes of learning domains 2..T: a method that learns the first one at its full rate gains nothing."""
    everything = comparison(NCL, SLOW, DAS)
    run = DAS.runs[0]
    losses = [list(row) for row in run.loss_matrix]
    losses[1][0] -= 0.4
    losses[2][0] -= 0.4
    eager = DAS.model_copy(update={"label": "das eager", "runs": [run.model_copy(update={"loss_matrix": losses})]})
    assert metric_values(eager, LOSS_AFTER_LEARNING)[0] == pytest.approx(3.3)
    assert metric_values(eager, LOSS_AFTER_LEARNING_LATER)[0] == pytest.approx(3.5)
    found = forgetting_vs_matched_baseline(comparison(NCL, SLOW, DAS, eager), eager)
    assert found is not None and found.mean == pytest.approx(0.6 - 0.7)
    assert matched_baseline_forgetting(everything, eager) == pytest.approx(0.7)


def test_loss_after_learning_later_one_domain_is_its_loss() -> None:
    run = DAS.runs[0].model_copy(update={"loss_matrix": [[6.0], [3.5]], "learned_rows": [1]})
    assert run.loss_after_learning_later == run.loss_after_learning == 3.5


def test_matched_baseline_outside_the_sweep_is_none() -> None:
    fast = group("das fast", [(2.9, 0.6), (3.1, 0.3)])
    everything = comparison(NCL, SLOW, fast, pooled("pool", [3.5, 3.7]))
    assert (
        forgetting_vs_matched_baseline(everything, fast) is None
        and matched_baseline_forgetting(everything, fast) is None
    )
    assert forgetting_vs_matched_baseline(everything, everything.group("pool")) is None
    assert forgetting_vs_matched_baseline(comparison(NCL, DAS), DAS) is None


def test_available_metrics_undefined_ones_are_omitted() -> None:
    drift_free = [run.model_copy(update={"general_drift": None}) for run in NCL.runs]
    assert GENERAL_DRIFT not in available_metrics(comparison(NCL.model_copy(update={"runs": drift_free})))
    assert available_metrics(comparison(pooled("pool", [2.5]))).count(FORGETTING) == 0
    assert FORGETTING in available_metrics(comparison(pooled("pool", [2.5]), NCL))


def test_available_metrics_have_the_drift_of_every_other_corpus() -> None:
    """After that of the general corpus, also where only some groups have it."""
    drifting = [run.model_copy(update={"drift": {"law": 0.25, "code": -0.5}}) for run in NCL.runs]
    metrics = available_metrics(comparison(NCL.model_copy(update={"runs": drifting}), DAS))
    titles = [metric.title for metric in metrics]
    place = metrics.index(GENERAL_DRIFT)
    assert titles[place + 1 : place + 3] == ["drift of law", "drift of code"]
    assert [metric.value(drifting[0]) for metric in metrics[place + 1 : place + 3]] == [0.25, -0.5]
    assert metrics[place + 1].value(DAS.runs[0]) is None
