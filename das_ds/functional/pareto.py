"""Learning against forgetting: which points no other beats, and what a line of points says at another place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy

Point = tuple[float, float]
"""Loss right after learning, and forgetting; both are better when smaller."""


def pareto_front(points: Sequence[Point]) -> list[int]:
    """Positions of the points that no other point equals or beats in both numbers and beats in one, left to right.

    Args:
        points: G points.
    """
    values_G2 = numpy.asarray(points, dtype=numpy.float64).reshape(-1, 2)
    no_worse_GG = (values_G2[:, None] <= values_G2[None]).all(axis=2)
    better_GG = (values_G2[:, None] < values_G2[None]).any(axis=2)
    is_beaten_G = (no_worse_GG & better_GG).any(axis=0)
    return sorted(numpy.flatnonzero(~is_beaten_G).tolist(), key=lambda position: points[position])


def line_at(points: Sequence[Point], place: float) -> float | None:
    """Height at `place` of the broken line through points; None beyond its ends, where it would be a guess.

    Args:
        points: in any order.
        place: first coordinate.
    """
    ordered = sorted(points)
    if len(ordered) < 2 or not ordered[0][0] <= place <= ordered[-1][0]:
        return None
    across, up = zip(*ordered, strict=True)
    return float(numpy.interp(place, across, up))
