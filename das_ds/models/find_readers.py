"""Finding the matrix readers of a network: which of its modules multiply an input by a trained matrix.

Shape legend: E experts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from das_ds.models.lora import Lora
from das_ds.models.matrix_readers import (
    ConvolutionReader,
    ExpertsReader,
    LinearReader,
    MatrixReader,
    OutputReader,
    StoredMatrix,
)
from das_ds.models.moe import is_transposed


def find_readers(
    model: PreTrainedModel,
    trained: dict[str, nn.Parameter],
    lora: Lora | None = None,
    full_shape: Callable[[nn.Parameter], torch.Size] = lambda parameter: parameter.shape,
) -> list[MatrixReader]:
    """The readers of all trained matrices, in the order of the network's modules.

    Args:
        model: the network, with adapters if it has any.
        trained: name -> parameter.
        lora: the adapters.
        full_shape: gives the shape of a complete parameter, of which ZeRO-3 leaves an empty vector in the model.
    """
    finder = _Finder(model, trained, lora, full_shape)
    return [reader for name, module in model.named_modules() for reader in finder.find(name, module)]


def embedding_names(model: PreTrainedModel, trained: dict[str, nn.Parameter]) -> set[str]:
    """Trained parameters from which `nn.Embedding`s take rows: no input is multiplied by them there."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {name for name, parameter in trained.items() if id(parameter) in embeddings}


class _Finder:
    def __init__(
        self,
        model: PreTrainedModel,
        trained: dict[str, nn.Parameter],
        lora: Lora | None,
        full_shape: Callable[[nn.Parameter], torch.Size],
    ) -> None:
        self._model = model
        self._names = {id(parameter): name for name, parameter in trained.items()}
        self._full_shape = full_shape
        linears = () if lora is None else lora.linears
        self._adapted = {linear.a: model.get_submodule(linear.weight.removesuffix(".weight")) for linear in linears}

    def find(self, name: str, module: nn.Module) -> Iterator[MatrixReader]:
        """The readers that a module is, or that are known from it."""
        if isinstance(module, nn.Linear | Conv1D):
            yield from self._linear(module, transposed=isinstance(module, Conv1D))
        elif isinstance(module, nn.Conv1d):
            yield from self._convolution(module)
        elif _has_stacked_experts(module):
            yield from self._routers(name, module)
            yield from self._experts(module)
        elif type(module).__name__ == "DebertaV2LMPredictionHead":
            yield from self._embedding_head(module)

    def _trained_name(self, module: nn.Module, attribute: str = "weight") -> str | None:
        return self._names.get(id(getattr(module, attribute, None)))

    def _linear(self, module: Any, *, transposed: bool = False) -> Iterator[MatrixReader]:
        name = self._trained_name(module)
        if name is not None:
            num_outputs, width = reversed(self._shape(module)) if transposed else self._shape(module)
            matrix = StoredMatrix(name, None, num_outputs, width, transposed)
            yield LinearReader(self._adapted.get(name, module), (matrix,))

    def _shape(self, module: Any, attribute: str = "weight") -> tuple[int, ...]:
        return tuple(self._full_shape(getattr(module, attribute)))

    def _convolution(self, module: nn.Conv1d) -> Iterator[MatrixReader]:
        name = self._trained_name(module)
        # Other paddings do not fill up with zeros, or by as much on both sides.
        if name is None or module.padding_mode != "zeros" or isinstance(module.padding, str):
            return
        num_channels, channels_of_group, size = self._shape(module)
        rows = num_channels // module.groups
        indices = range(module.groups) if module.groups > 1 else (None,)
        yield ConvolutionReader(
            module, tuple(StoredMatrix(name, index, rows, channels_of_group * size) for index in indices)
        )

    def _experts(self, module: Any) -> Iterator[MatrixReader]:
        matrices = []
        for attribute in ("gate_up_proj", "down_proj"):
            name = self._trained_name(module, attribute)
            if name is None:
                return
            num_experts, *shape = self._shape(module, attribute)
            transposed = is_transposed(module)
            num_outputs, width = reversed(shape) if transposed else shape
            matrices += [StoredMatrix(name, e, num_outputs, width, transposed) for e in range(num_experts)]
        yield ExpertsReader(module, tuple(matrices))

    def _routers(self, name: str, experts: Any) -> Iterator[MatrixReader]:
        """Modules next to the experts that multiply tokens by a row for each expert, without being linear layers."""
        num_experts = self._shape(experts, "gate_up_proj")[0]
        parent, _, _ = name.rpartition(".")
        for module in self._model.get_submodule(parent).children():
            if self._trained_name(module) is None or isinstance(module, nn.Linear):
                continue
            shape = self._shape(module)
            if len(shape) == 2 and shape[0] == num_experts:
                yield from self._linear(module)

    def _embedding_head(self, module: Any) -> Iterator[MatrixReader]:
        embeddings = self._model.get_input_embeddings()
        name = self._trained_name(embeddings)
        if name is not None:
            num_tokens, width = self._shape(embeddings)
            yield OutputReader(module.LayerNorm, (StoredMatrix(name, None, num_tokens, width),))


def _has_stacked_experts(module: nn.Module) -> bool:
    """Whether `moe.observed_experts_forward` can run a module."""
    names = ("gate_up_proj", "down_proj")
    if not all(isinstance(getattr(module, name, None), nn.Parameter) for name in names):
        return False
    return getattr(module, "has_gate", True) and not getattr(module, "has_post_expert_norm", False)
