"""Input covariances: uncentered second moments of the inputs of linear layers, over a sample of text.

Shape legend: R rows of a batch, S positions, P predicted positions, d width of an input, o of an output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from das_ds.context import RunContext
from das_ds.data.batch import Batch
from das_ds.distributed.collectives import all_reduce_sum, rank
from das_ds.distributed.resumable import ResumableLoop
from das_ds.errors import ModelError, TrainingError
from das_ds.functional.directions import normalized_second_moment
from das_ds.softmask.measure import PRETRAINING

COUNT = "#count "
"""Prefix of the names under which a pass counts inputs; no parameter has a space in its name."""


def linear_layers(run: RunContext) -> dict[str, nn.Linear]:
    """Name of a trained weight (o, d) -> the linear layer that multiplies by it.

    Embeddings are included where the LM head shares them.

    Raises:
        ModelError: a matrix of the network's layers is not the weight of a linear layer, and would stay unprotected.
    """
    trained = {id(parameter): name for name, parameter in run.engine.parameters.items()}
    layers = {
        trained[id(module.weight)]: module
        for module in run.network.model.modules()
        if isinstance(module, nn.Linear) and id(module.weight) in trained
    }
    for item in run.layout.ownerships:
        _, num_rows, num_columns = run.layout.shapes[item.parameter]
        is_vector = min(num_rows, num_columns) == 1
        if item.parameter in run.engine.parameters and item.parameter not in layers and not is_vector:
            raise ModelError(
                f"method.name: found {run.config.method.name}, but {item.parameter} is no weight of a "
                "torch.nn.Linear (a convolution, or stacked experts); allowed for this network: "
                "masks of units or weights"
            )
    return layers


def input_second_moments(run: RunContext, batches: ResumableLoop[Batch]) -> dict[str, torch.Tensor]:
    """M = A / (tr(A) / d), A = E[x x^T], of the inputs x of every trained linear layer.

    The expectation is over all positions of the sample that reach the layer, on all ranks, without dropout, of the text
    as training corrupts it; the LM head sees predicted positions only. A table that a layer reads in every forward
    pass, such as that of relative positions, counts once, however many passes the sample needs.

    Args:
        run: the engine and its network.
        batches: this rank's batches; every rank has the same number of them.

    Returns:
        Name of the weight -> (d, d) float32 in host memory, equal on every rank.

    Raises:
        TrainingError: an input that is not finite, on any rank.
    """
    layers = linear_layers(run)
    sums = batches.accumulators
    device = run.engine.ranks.info.device
    for name, layer in layers.items():
        width = layer.in_features
        sums.setdefault(name, torch.zeros(width, width, device=device))
        sums.setdefault(COUNT + name, torch.zeros((), dtype=torch.float64, device=device))
    with PRETRAINING.mode(run), torch.no_grad():
        for batch in batches:
            batch = batch.to(device)
            # Tables are equal in all batches and on all ranks: the first batch of rank 0 is enough.
            inputs = _BatchInputs(sums, batch, with_tables=batches.num_done == 0 and rank() == 0)
            with _forward_hooks(layers, inputs.add):
                run.engine.module(batch.corrupted_ids, batch.predicted, batch.targets, batch.position_ids)
    # One at a time: the device has memory for the sums, not for a second copy of all.
    return {name: _normalize(name, sums[name], sums[COUNT + name]).cpu() for name in layers}


@contextmanager
def _forward_hooks(layers: dict[str, nn.Linear], receive: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    def hook(name: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        receive(name, inputs[0])

    handles = [layer.register_forward_pre_hook(partial(hook, name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _BatchInputs:
    """Adds the inputs of layers in one forward pass to the sums of all passes.

    Args:
        sums: see `input_second_moments`.
        batch: of this forward pass.
        with_tables: whether tables count, which are the same in every forward pass.
    """

    def __init__(self, sums: dict[str, torch.Tensor], batch: Batch, *, with_tables: bool) -> None:
        self._sums = sums
        self._batch = batch
        self._with_tables = with_tables
        self._called: set[str] = set()

    def add(self, name: str, inputs: torch.Tensor) -> None:
        """Add inputs (R, S, d) or (R * S, d) of tokens, (P, d) of predicted positions, or a table (1, rows, d).

        Rows that only fill the batch do not count; they predict nothing.
        """
        num_rows, num_positions = self._batch.input_ids.shape
        shape = inputs.shape[:-1]
        # A table can have as many rows as the batch has positions, but a layer reads it after the tokens.
        is_first_call = name not in self._called
        self._called.add(name)
        is_of_tokens = is_first_call and shape in ((num_rows, num_positions), (num_rows * num_positions,))
        is_table = inputs.dim() == 3 and not is_of_tokens
        if is_table and not self._with_tables:
            return
        flat = inputs.detach().flatten(0, -2).float()
        count: torch.Tensor | int = len(flat)
        if is_of_tokens:
            weights = self._batch.row_weights.repeat_interleave(num_positions)
            flat = flat * weights[:, None]
            count = weights.sum()
        self._sums[name] += flat.T @ flat
        self._sums[COUNT + name] += count


def _normalize(name: str, total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    # Clones: a pass that is repeated after a restart still needs this rank's own sums.
    total = all_reduce_sum(total.clone())
    count = all_reduce_sum(count.clone())
    if not total.isfinite().all():
        raise TrainingError(
            f"importance: found an input of {name} that is not finite, expected finite numbers; the model diverged, "
            "or its activations leave the range of train.precision (bf16 and fp32 have a larger one)"
        )
    return normalized_second_moment(total / count.clamp_min(1).float())
