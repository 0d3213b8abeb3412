"""Weights that a domain may end with: copied, restored, saved, and counted."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from das_ds.models.size import ModelSize, Sharding
from das_ds.training.kept_weights import KeptWeights, kept_memory
from helpers.training import run_config

SIZE = ModelSize(
    trained=1000, total=1500, largest_layer=300, num_units=50, num_layers=2, hidden=10, inner=40, heads=2, vocabulary=60
)
SHARDING = Sharding(stage=2, num_ranks=4, weight_bytes=2, gradient_bytes=4, num_moments=2)


class OneFlat:
    """Weights of one flat tensor."""

    def __init__(self, values: list[float]) -> None:
        self.flat = torch.tensor(values)

    def flats(self) -> dict[torch.Tensor, torch.Tensor]:
        return {self.flat: self.flat.data}

    def load(self, saved: dict[torch.Tensor, torch.Tensor]) -> None:
        for flat, values in saved.items():
            flat.copy_(values)


def saved(state: Any) -> Any:
    """A state as a checkpoint gives it back."""
    return SimpleNamespace(has_sharded=lambda name: name in state.sharded, sharded=lambda name: state.sharded[name])


def test_kept_weights_are_copies_that_outlive_training_and_checkpoints() -> None:
    weights: Any = OneFlat([1.0, 2.0])
    kept = KeptWeights(weights)
    kept.keep("best")
    weights.flat.mul_(10.0)
    kept.keep("within_limits")
    state = kept.state_dict()
    weights.flat.mul_(10.0)
    # Replaced after the checkpoint began, which still writes the earlier values.
    kept.keep("within_limits")
    assert [values.tolist() for values in state.sharded["within_limits"].values()] == [[10.0, 20.0]]
    resumed = KeptWeights(weights)
    resumed.load_state_dict(saved(state))
    resumed.restore("within_limits")
    assert weights.flat.tolist() == [10.0, 20.0]
    resumed.restore("best")
    assert weights.flat.tolist() == [1.0, 2.0]
    kept.restore("within_limits")
    assert weights.flat.tolist() == [100.0, 200.0]
    kept.clear()
    assert kept.state_dict().sharded == {}
    kept.load_state_dict(saved(KeptWeights(weights).state_dict()))
    assert kept.state_dict().sharded == {}


@pytest.mark.parametrize(
    ("evaluation", "limits", "host", "num_copies", "domain"),
    [
        ({"every_steps": 2}, None, {}, 0, 0),
        ({"every_steps": 2, "continue_from": "best"}, None, {"weights of the best step": 1000}, 1, 0),
        ({"every_steps": 2, "keep_best": True}, {"earlier": 0.1}, {"weights of the best step": 1000}, 1, 6000),
        (
            {"every_steps": 2, "keep_best": True},
            {"earlier": 0.1, "action": "rollback"},
            {"weights of the best step": 1000, "weights within the limits": 1000},
            2,
            6000,
        ),
    ],
)
def test_kept_memory_counts_copies_and_second_models(
    evaluation: dict[str, Any], limits: Any, host: dict[str, int], num_copies: int, domain: int, tmp_path: Path
) -> None:
    config = run_config(tmp_path, evaluation=evaluation, faults={"max_forgetting": limits}, method={"name": "ncl"})
    use = kept_memory(config, SIZE, SHARDING)
    assert use.host == host
    # A checkpoint has the weights of all ranks.
    assert use.checkpoint == 4000 * num_copies
    assert use.domain == domain
