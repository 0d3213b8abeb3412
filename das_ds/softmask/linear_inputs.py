"""Inputs of linear layers: which matrices of a network read the same input, and a record of it in forward passes.

Shape legend: n vectors, d width of an input, o of an output; R rows of a batch, S positions.
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
from das_ds.errors import ModelError
from das_ds.softmask.masked_matrix import MaskedMatrix

Receive = Callable[[str, torch.Tensor, torch.Tensor | None, bool], None]
"""(input, x (n, d), weights (n,) or None: all count once, whether it is the same in every forward pass) -> None."""


def find_masked_matrices(run: RunContext) -> list[MaskedMatrix]:
    """Every trained weight of a linear layer, in the order of the modules; the same on every rank.

    Embeddings are included where the LM head shares them. Layers share an input if they are given the same tensors
    in one forward pass; its name is that of the first weight that reads it.

    Raises:
        ModelError: a matrix of the network's layers is not the weight of a linear layer, and would stay unprotected.
    """
    layers = _linear_layers(run)
    device = run.engine.ranks.info.device
    read: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
    first = torch.zeros(1, dtype=torch.int64, device=device)
    run.engine.module.eval()
    with torch.no_grad(), _forward_hooks(layers, lambda name, inputs: read[name].append(inputs)):
        run.engine.module(ids, first, first, None)
    run.engine.module.train()
    # By address: DeepSpeed's hooks at ZeRO 3 give each layer another object of the same memory. `read` keeps all tensors
    # until the end, so that no two inputs have one address.
    inputs: dict[tuple[int, ...], str] = {}
    return [
        MaskedMatrix(
            name=name,
            parameter=name,
            start=0,
            num_outputs=layer.out_features,
            width=layer.in_features,
            input=inputs.setdefault(tuple(tensor.data_ptr() for tensor in read[name]), name),
        )
        for name, layer in layers.items()
    ]


@contextmanager
def record_inputs(run: RunContext, inputs: set[str], receive: Receive, batch: Batch) -> Iterator[None]:
    """Inside, every forward pass gives `receive` each of these inputs, once.

    Rows that only fill the batch have weight 0. The LM head sees predicted positions only, all of which count. A table
    that layers read in every forward pass, such as that of relative positions, is given as such.

    Args:
        run: the engine and its network.
        inputs: names of inputs, see `MaskedMatrix.input`.
        receive: what is to be done with them.
        batch: of the forward pass.
    """
    called: set[str] = set()
    num_rows, num_positions = batch.input_ids.shape

    def pass_on(name: str, tensor: torch.Tensor) -> None:
        shape = tensor.shape[:-1]
        # A table can have as many rows as the batch has positions, but a layer reads it after the tokens.
        is_first_call = name not in called
        called.add(name)
        is_of_tokens = is_first_call and shape in ((num_rows, num_positions), (num_rows * num_positions,))
        weights = batch.row_weights.repeat_interleave(num_positions) if is_of_tokens else None
        receive(name, tensor.detach().flatten(0, -2), weights, tensor.dim() == 3 and not is_of_tokens)

    layers = {name: layer for name, layer in _linear_layers(run).items() if name in inputs}
    with _forward_hooks(layers, pass_on):
        yield


def _linear_layers(run: RunContext) -> dict[str, nn.Linear]:
    """Name of a trained weight (o, d) -> the linear layer that multiplies by it."""
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
