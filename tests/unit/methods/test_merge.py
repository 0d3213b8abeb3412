"""The weight of the earlier model, against the mean of all models written out."""

from __future__ import annotations

import pytest
import torch

from das_ds.methods.merge import merge_weight


def test_merge_weight_average_is_mean_of_all_models() -> None:
    models = torch.randn(6, 5, dtype=torch.float64)
    merged = models[0]
    for num_learned, model in enumerate(models[1:], start=1):
        share = merge_weight("average", num_learned)
        merged = (1 - share) * model + share * merged
        torch.testing.assert_close(merged, models[: num_learned + 1].mean(0))


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_merge_weight_number_is_constant(weight: float) -> None:
    assert [merge_weight(weight, num_learned) for num_learned in (1, 7)] == [weight] * 2
