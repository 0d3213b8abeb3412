"""Masks of directions on every number of ranks up to 97, in one process, against complete products."""

from __future__ import annotations

import pytest

from helpers.direction_masks import CUTS, check_gradients


@pytest.mark.parametrize("cut", CUTS)
def test_apply_every_number_of_ranks_equals_complete_product(cut: str) -> None:
    for num_ranks in range(1, 98):
        check_gradients(cut, num_ranks)
