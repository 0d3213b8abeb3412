"""Statistics of what masks leave, by kind of layer."""

from __future__ import annotations

import pytest

from das_ds.softmask.plasticity import InputPlasticity, PlasticityReading, Spread

GROUPS = {"q0": "attention", "q1": "attention", "q2": "attention", "f0": "MLP"}


def test_summarize_weighs_directions_and_takes_medians_of_inputs() -> None:
    inputs = {
        "q0": InputPlasticity(10, 0.5, 0.1),
        "q1": InputPlasticity(10, 0.7, 0.4),
        "q2": InputPlasticity(10, 0.6, 0.9),
        "f0": InputPlasticity(70, 0.2, 0.05),
    }
    found = PlasticityReading.summarize(inputs, GROUPS)
    assert found.plasticity == pytest.approx((5 + 7 + 6 + 14) / 100)
    assert found.passing == pytest.approx((0.1 + 0.4) / 2)
    assert list(found.groups) == ["attention", "MLP"]
    assert found.groups["attention"].num_inputs == 3
    assert found.groups["attention"].plasticity == Spread(median=0.6, least=0.5, most=0.7)
    assert found.groups["attention"].passing == Spread(median=0.4, least=0.1, most=0.9)
    assert found.least_passing == ("MLP", 0.05)


def test_summarize_inputs_that_the_sample_never_reached_do_not_count() -> None:
    inputs = {
        "q0": InputPlasticity(4, 0.5, 0.2),
        "q1": InputPlasticity(4, 1.0, None),
        "f0": InputPlasticity(4, 0.3, None),
    }
    found = PlasticityReading.summarize(inputs, GROUPS)
    assert found.passing == 0.2 and found.groups["attention"].passing == Spread(median=0.2, least=0.2, most=0.2)
    assert found.groups["MLP"].passing is None and found.least_passing == ("attention", 0.2)


def test_summarize_nothing_measured_has_no_energy() -> None:
    found = PlasticityReading.summarize({"f0": InputPlasticity(4, 0.3, None)}, GROUPS)
    assert found.plasticity == pytest.approx(0.3) and found.passing is None and found.least_passing is None
    assert list(found.groups) == ["MLP"]
