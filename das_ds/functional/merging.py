"""How much of the earlier model an average of weights keeps."""

from __future__ import annotations

from typing import Literal


def share_of_earlier(coefficient: float | Literal["average"], num_learned: int) -> float:
    """c of theta <- (1 - c) * theta + c * theta_before.

    `average` gives c = t / (t + 1), so that by induction theta_t is the mean of t + 1 models: the base and those at the
    end of domains 1 to t (the running average of Izmailov et al., UAI 2018, algorithm 1).

    Args:
        coefficient: c, or `average`.
        num_learned: t, domains learned so far, the present one included.
    """
    return num_learned / (num_learned + 1) if coefficient == "average" else coefficient
