"""What flows into the linear layers of a network, over a sample of text: second moments of their inputs.

Shape legend: R rows of a batch, S positions, P predicted positions, d width of an input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from das_ds.data.batches import Batch
from das_ds.distributed.collectives import all_reduce_sum
from das_ds.distributed.passes import Pass
from das_ds.errors import ModelError
from das_ds.functional.directions import relative_moment
from das_ds.methods.context import RunContext
from das_ds.methods.importance_pass import PRETRAINING

COUNT = "#count "
"""Begins the names under which a pass sums how many inputs there were; no parameter has a space in its name."""


def linear_layers(run: RunContext) -> dict[str, nn.Linear]:
    """Name of a trained weight (o, d) -> the linear layer that multiplies by it.

    Embeddings are among them where the LM head shares them.

    Raises:
        ModelError: a matrix of the network's layers is no weight of a linear layer, and would stay unprotected.
    """
    trained = {id(parameter): name for name, parameter in run.engine.parameters.items()}
    found = {
        trained[id(module.weight)]: module
        for module in run.network.model.modules()
        if isinstance(module, nn.Linear) and id(module.weight) in trained
    }
    for item in run.layout.ownerships:
        _, num_rows, num_columns = run.layout.shapes[item.parameter]
        is_vector = min(num_rows, num_columns) == 1
        if item.parameter in run.engine.parameters and item.parameter not in found and not is_vector:
            raise ModelError(
                f"method.importance.granularity: found direction, but {item.parameter} is no weight of a "
                "torch.nn.Linear (a convolution, or stacked experts); allowed for this network: unit, parameter"
            )
    return found


def relative_moments(run: RunContext, batches: Pass[Batch]) -> dict[str, torch.Tensor]:
    """M = A / (tr(A) / d), A = E[x x^T], of the inputs x of every trained linear layer.

    The expectation is over all positions of the sample that reach the layer, on all ranks, without dropout, of the text
    as training corrupts it; the LM head sees predicted positions alone.

    Args:
        run: the engine and its network.
        batches: this rank's batches; every rank has the same number of them.

    Returns:
        Name of the weight -> (d, d) float32, equal on every rank.
    """
    layers, sums, device = linear_layers(run), batches.sums, run.engine.ranks.info.device
    for name, layer in layers.items():
        width = layer.in_features
        sums.setdefault(name, torch.zeros(width, width, device=device))
        sums.setdefault(COUNT + name, torch.zeros((), dtype=torch.float64, device=device))
    with PRETRAINING.mode(run), torch.no_grad():
        for batch in batches:
            batch = batch.to(device)
            with _listening(layers, partial(_add, sums, batch)):
                run.engine.module(batch.corrupted_ids, batch.predicted, batch.targets, batch.position_ids)
    return {name: _relative(sums[name], sums[COUNT + name]) for name in layers}


@contextmanager
def _listening(layers: dict[str, nn.Linear], receive: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    def hook(name: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        receive(name, inputs[0])

    handles = [layer.register_forward_pre_hook(partial(hook, name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add(sums: dict[str, torch.Tensor], batch: Batch, name: str, inputs: torch.Tensor) -> None:
    """Add inputs (R, S, d), (R * S, d) or (P, d); rows that only fill the batch do not count, and predict nothing."""
    flat, (num_rows, num_positions) = inputs.detach().flatten(0, -2).float(), batch.input_ids.shape
    count: torch.Tensor | int = len(flat)
    if len(flat) == num_rows * num_positions:
        weights = batch.row_weights.repeat_interleave(num_positions)
        flat, count = flat * weights[:, None], weights.sum()
    sums[name] += flat.T @ flat
    sums[COUNT + name] += count


def _relative(total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    # Clones: a pass that is done again still needs what this rank had.
    total, count = all_reduce_sum(total.clone()), all_reduce_sum(count.clone())
    return relative_moment(total / count.clamp_min(1).float())
