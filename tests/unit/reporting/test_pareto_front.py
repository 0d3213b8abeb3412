"""Pareto front against a comparison of all pairs; interpolation by hand."""

from __future__ import annotations

import numpy
import pytest

from das_ds.reporting.statistics import interpolate_front, pareto_front


def test_pareto_front_worked_example() -> None:
    points = [(3.0, 1.0), (1.0, 4.0), (2.0, 2.0), (2.5, 2.0), (3.5, 1.5), (1.0, 5.0)]
    assert pareto_front(points) == [1, 2, 0]


def test_pareto_front_equal_points_are_both_kept() -> None:
    assert pareto_front([(1.0, 1.0), (1.0, 1.0), (2.0, 1.0)]) == [0, 1]


def test_pareto_front_random_points_are_not_dominated() -> None:
    points = [
        tuple(point) for point in numpy.random.default_rng(0).integers(0, 12, size=(60, 2)).astype(float).tolist()
    ]
    front = {points[position] for position in pareto_front(points)}
    for point in points:
        is_beaten = any(all(o <= p for o, p in zip(other, point, strict=True)) and other != point for other in points)
        assert (point in front) == (not is_beaten)


@pytest.mark.parametrize(
    ("place", "expected"), [(1.0, 8.0), (1.5, 6.0), (2.0, 4.0), (3.5, 1.0), (4.0, 0.0), (0.9, None), (4.1, None)]
)
def test_interpolate_front_worked_example(place: float, expected: float | None) -> None:
    assert interpolate_front([(4.0, 0.0), (1.0, 8.0), (2.0, 4.0), (3.0, 2.0)], place) == expected


def test_interpolate_front_one_point_is_none() -> None:
    assert interpolate_front([(1.0, 1.0)], 1.0) is None
