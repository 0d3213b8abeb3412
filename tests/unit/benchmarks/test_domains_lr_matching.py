"""Learning-rate matching of naive training."""

import math

import pytest

from benchmarks.domains.lr_matching import Match, Probe, match, next_rate


def loss_at_rate(rate: float) -> float:
    """A curve as learning has it: steep at small rates, flat at large ones."""
    return 4.0 + 1.5 * math.exp(-1.2 * math.log(rate / 1e-5))


KNOWN = [Probe(8e-4, loss_at_rate(8e-4)), Probe(4e-4, loss_at_rate(4e-4)), Probe(2e-4, loss_at_rate(2e-4))]


@pytest.mark.parametrize("sought", [3e-5, 7e-5, 1.5e-4, 3e-4, 6e-4])
def test_match_finds_rate_between_or_below_known_ones(sought: float) -> None:
    found = match("das", loss_at_rate(sought), KNOWN, loss_at_rate, tolerance=1e-3, max_probes=12)
    assert found.is_met
    assert loss_at_rate(found.best.learning_rate) == found.best.learned == pytest.approx(loss_at_rate(sought), abs=1e-3)
    assert found.probes[:3] == tuple(KNOWN)


def test_match_known_rate_within_tolerance_runs_nothing() -> None:
    def unused(_: float) -> float:
        raise AssertionError

    assert match("das", loss_at_rate(4e-4) + 0.005, KNOWN, unused, tolerance=0.01, max_probes=4).best == KNOWN[1]


def test_match_method_that_learns_more_runs_nothing() -> None:
    found = match("das", loss_at_rate(8e-4) - 0.1, KNOWN, loss_at_rate, tolerance=0.01, max_probes=4)
    assert not found.needs_lowering and not found.is_met
    assert len(found.probes) == len(KNOWN)


def test_match_ignores_rates_that_are_too_high() -> None:
    found = match("das", loss_at_rate(1e-4), [Probe(1e-2, 9.0), *KNOWN], loss_at_rate, tolerance=1e-3, max_probes=6)
    assert found.needs_lowering and found.is_met
    assert found.best.learning_rate == pytest.approx(1e-4, rel=0.05)


def test_match_probes_and_rates_are_bounded() -> None:
    few = match("das", loss_at_rate(4.6e-5), KNOWN, loss_at_rate, tolerance=1e-9, max_probes=2)
    assert len(few.probes) == len(KNOWN) + 2 and not few.is_met
    endless = match("das", 99.0, KNOWN, lambda rate: 4.5, tolerance=0.01, max_probes=50)
    assert min(probe.learning_rate for probe in endless.probes) >= 8e-4 / 64
    assert not endless.is_met and endless.needs_lowering


def test_next_rate_is_inside_the_bracket() -> None:
    probes = (Probe(1e-4, 5.0), Probe(1e-3, 4.0))
    rate = next_rate(probes, 4.5)
    assert rate == pytest.approx(math.sqrt(1e-4 * 1e-3))
    nearly = next_rate(probes, 4.999)
    assert nearly is not None and nearly == pytest.approx(1e-4 * 10**0.1)


def test_match_best_is_the_nearest_probe() -> None:
    found = Match("das", 4.2, 0.05, (Probe(1e-4, 4.4), Probe(2e-4, 4.21), Probe(4e-4, 4.0)))
    assert found.best.learning_rate == 2e-4 and found.is_met
