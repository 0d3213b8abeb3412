"""Estimated memory of frozen subspaces against counted allocations of a small network, on one rank."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

from das_ds.methods import method_memory
from das_ds.models.architectures.registry import spec_for
from das_ds.models.size import MemoryUse, Sharding
from das_ds.preflight.memory import count_parameters
from das_ds.softmask.direction_mask import build_direction_mask
from das_ds.softmask.direction_update_mask import build_update_masks
from das_ds.softmask.frozen_subspaces import FrozenSubspaces, build_subspace_layout
from das_ds.softmask.hidden_matrices import find_hidden_matrices
from helpers.allocations import AllocationCounter
from helpers.fake_run import make_run
from helpers.tiny_models import tiny_model, without_dropout

NETWORK = {"hidden_size": 96, "intermediate_size": 160}
SHARDING = Sharding(stage=2, num_ranks=1, weight_bytes=4, gradient_bytes=4, num_moments=2)


def make_estimate(run: Any) -> MemoryUse:
    with torch.device("meta"):
        model = tiny_model("roberta", **without_dropout("roberta"), **NETWORK)
    return method_memory(run.config, count_parameters(run.config, model, spec_for("roberta"), 100), SHARDING)


def decompose(run: Any, ratio: float) -> FrozenSubspaces:
    layout = build_subspace_layout(find_hidden_matrices(run.layout), run.engine.weights.shards, run.engine.ranks)
    return FrozenSubspaces.decompose(run.engine, layout, ratio)


@pytest.mark.parametrize("ratio", [0.25, 0.6])
def test_memory_of_subspaces_and_steps_is_as_estimated(ratio: float, tmp_path: Path) -> None:
    run = make_run(tmp_path, {"name": "osft", "unfreeze_rank_ratio": ratio}, **NETWORK)
    use = make_estimate(run)
    counter = AllocationCounter()
    counter.ignore(run.network.parameters())
    with counter:
        subspaces = decompose(run, ratio)
    held = sum(projector.num_bytes for projector in subspaces.projectors.values())
    assert held == use.device["frozen subspaces"]
    state = subspaces.state_dict().owned
    assert sum(tensor.nbytes for tensor in state.values()) == pytest.approx(use.checkpoint, rel=0.01)
    # A solver's work space is not counted.
    assert held <= counter.peak <= held + use.device_at_start["decomposition of one matrix"]
    tensors = list(state.values())
    matrices = [matrix.as_vector() for matrix in find_hidden_matrices(run.layout)]
    shards = run.engine.weights.shards
    device = torch.device("cpu")
    gradients = [torch.ones(shard.numel) for shard in shards]
    mask = build_direction_mask(shards, matrices, subspaces.projectors, device)
    of_gradients = AllocationCounter()
    of_gradients.ignore([*gradients, *tensors])
    with of_gradients:
        mask.apply_(gradients)
    flat = torch.cat([torch.ones(shard.numel) for shard in shards])
    starts = [0, *accumulate(shard.numel for shard in shards)]
    placed = [replace(shard, flat=flat, flat_start=start) for shard, start in zip(shards, starts, strict=False)]
    flats = dict.fromkeys((shard.name for shard in shards), flat)
    updates = build_update_masks(placed, flats, matrices, subspaces.projectors, device)[flat]
    of_updates = AllocationCounter()
    of_updates.ignore([flat, *tensors])
    with of_updates:
        for chunk in updates.chunks():
            updates.blend_(flat[chunk], flat[chunk].clone(), chunk)
        updates.finish_(flat)
    products = use.device_in_step["products of masks"]
    assert of_gradients.peak <= products
    assert of_updates.peak == pytest.approx(products + use.optimizer["old values of a chunk"], rel=0.1)
