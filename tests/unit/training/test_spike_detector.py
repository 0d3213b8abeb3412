"""The window of losses against numpy, and what counts as a spike at its edges."""

from __future__ import annotations

import numpy as np
import pytest

from das_ds.training.loss_guard import RESOLUTION, SpikeDetector


def filled(losses: list[float], *, window: int, deviations: float = 6.0) -> SpikeDetector:
    detector = SpikeDetector(window, deviations)
    for loss in losses:
        detector.accept(loss)
    return detector


# A huge level with a tiny spread is where sums of squares lose every digit.
@pytest.mark.parametrize(("level", "spread"), [(3.0, 0.5), (1e8, 1e-3), (0.0, 1e-9)])
def test_spike_detector_mean_and_deviation_of_window(level: float, spread: float) -> None:
    losses = (level + spread * np.random.default_rng(0).standard_normal(200)).tolist()
    detector = SpikeDetector(16, 6.0)
    for number, loss in enumerate(losses, start=1):
        detector.accept(loss)
        window = np.array(losses[max(0, number - 16) : number])
        # Once the level is taken off, numpy loses no digits; the mean itself is rounded at its own size.
        centered = window - window[0]
        assert detector.mean == pytest.approx(window[0] + centered.mean(), rel=1e-15, abs=1e-24)
        assert detector.deviation == pytest.approx(centered.std(), rel=1e-7, abs=1e-15)


def test_is_spike_above_threshold() -> None:
    losses = [1.0, 2.0, 3.0, 4.0]
    detector = filled(losses, window=4, deviations=3.0)
    edge = np.mean(losses) + 3.0 * np.std(losses)
    assert detector.is_spike(edge + 1e-9) and not detector.is_spike(edge - 1e-9)
    assert not detector.is_spike(-100.0)


def test_is_spike_before_window_is_full_is_false() -> None:
    detector = filled([1.0] * 7, window=8)
    assert not detector.is_spike(1e9)
    detector.accept(1.0)
    assert detector.is_spike(1e9)


@pytest.mark.parametrize("level", [0.0, 2.5, 1e4])
def test_is_spike_equal_losses_allow_rounding(level: float) -> None:
    detector = filled([level] * 8, window=8)
    assert detector.deviation == 0.0
    assert not detector.is_spike(level)
    assert not detector.is_spike(float(np.nextafter(np.float32(level), np.float32(np.inf))))
    assert detector.is_spike(level + 7.0 * RESOLUTION * max(1.0, level))


def test_accept_drops_oldest_loss() -> None:
    detector = filled([100.0, 1.0, 1.1, 0.9, 1.0], window=4)
    assert detector.state() == [1.0, 1.1, 0.9, 1.0]
    assert detector.is_spike(2.0)


def test_state_round_trip_is_bitwise() -> None:
    losses = np.random.default_rng(1).standard_normal(40).tolist()
    detector = filled(losses[:20], window=8)
    continued = SpikeDetector(8, 6.0)
    continued.load(detector.state())
    for loss in losses[20:]:
        detector.accept(loss)
        continued.accept(loss)
        assert (continued.mean, continued.deviation) == (detector.mean, detector.deviation)
    detector.clear()
    assert detector.state() == [] and not detector.is_spike(1e9)


def test_load_of_longer_window_keeps_newest() -> None:
    detector = SpikeDetector(2, 6.0)
    detector.load([1.0, 2.0, 3.0])
    assert detector.state() == [2.0, 3.0]


def test_accept_infinite_loss_fails() -> None:
    with pytest.raises(AssertionError, match="finite"):
        SpikeDetector(8, 6.0).accept(float("inf"))
