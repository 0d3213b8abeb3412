"""Matrix readers: the modules of a network that multiply an input by a trained matrix, y = W x.

One reader per module. Together they know for every kind of layer where its matrices lie in their parameters, and what
exactly each of them multiplies: a hook reaches the input of a linear layer, but not the windows of a convolution, nor
the tokens that a router sends to an expert.

Shape legend: d width of an input, o of an output; R rows of a batch, S positions, T = R S tokens, E experts, H hidden
size, I units of an expert, n tokens of one expert; k size of a convolution's kernel, G its groups, C its channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from das_ds.models.lora import Lora
from das_ds.models.moe import RoutedTokens, is_transposed, observed_experts_forward

Receive = Callable[[int, torch.Tensor, RoutedTokens | None], None]
"""(number among the reader's matrices, x (..., d) of one call, the tokens that x belongs to if they were routed)."""
Remove = Callable[[], None]


@dataclass(frozen=True)
class StoredMatrix:
    """One matrix W (o, d) and where it is stored."""

    parameter: str
    index: int | None
    """Its number among the matrices of the parameter; None: it is all of the parameter."""
    num_outputs: int
    """o."""
    width: int
    """d."""
    transposed: bool = False
    """Whether it is stored as (d, o)."""

    @property
    def name(self) -> str:
        """Of the parameter, with the matrix's number in brackets."""
        return self.parameter if self.index is None else f"{self.parameter}[{self.index}]"

    @property
    def start(self) -> int:
        """First element in the flattened parameter."""
        return (self.index or 0) * self.num_outputs * self.width


class MatrixReader(Protocol):
    """A module, and the matrices that it multiplies by."""

    @property
    def matrices(self) -> tuple[StoredMatrix, ...]:
        """In a fixed order."""

    def hook(self, receive: Receive) -> Remove:
        """From now on every call of the module gives `receive` what each of the matrices multiplies."""

    def trace(self, receive: Receive) -> Remove:
        """Like `hook`, but for the shapes only: what the module returns has to be of the right shape and no more."""


@dataclass(frozen=True, eq=False)
class LinearReader:
    """A module that multiplies its input (..., d) by one matrix: a linear layer, or the router of experts."""

    module: nn.Module
    """The module whose input it is. For LoRA's A it is the adapted layer: A reads a copy of that layer's input."""
    matrix: StoredMatrix

    @property
    def matrices(self) -> tuple[StoredMatrix, ...]:
        """The one matrix."""
        return (self.matrix,)

    def hook(self, receive: Receive) -> Remove:
        """See `MatrixReader`."""
        return self.module.register_forward_pre_hook(lambda _, inputs: receive(0, inputs[0], None)).remove

    def trace(self, receive: Receive) -> Remove:
        """See `MatrixReader`."""
        return self.hook(receive)


@dataclass(frozen=True, eq=False)
class EmbeddingHeadReader:
    """A module whose output (..., d) its caller multiplies by the input embeddings, as DeBERTa's newer LM head does."""

    module: nn.Module
    matrix: StoredMatrix

    @property
    def matrices(self) -> tuple[StoredMatrix, ...]:
        """The embeddings."""
        return (self.matrix,)

    def hook(self, receive: Receive) -> Remove:
        """See `MatrixReader`."""
        return self.module.register_forward_hook(lambda _, __, output: receive(0, output, None)).remove

    def trace(self, receive: Receive) -> Remove:
        """See `MatrixReader`."""
        return self.hook(receive)


@dataclass(frozen=True, eq=False)
class ConvolutionReader:
    """A convolution over positions: a linear layer whose input are windows, d = (C / G) k, one matrix for each group.

    A window has its channels one after the other, and the k positions of a channel in a row, like the stored weight.
    """

    module: nn.Conv1d
    matrices: tuple[StoredMatrix, ...]

    def hook(self, receive: Receive) -> Remove:
        """See `MatrixReader`."""

        def give_windows(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            # (R, C, S) -> (R, positions of the output, C k).
            padding = int(self.module.padding[0])
            windows = functional.unfold(
                inputs[0].unsqueeze(2),
                (1, *self.module.kernel_size),
                dilation=(1, *self.module.dilation),
                padding=(0, padding),
                stride=(1, *self.module.stride),
            ).transpose(1, 2)
            for group, own in enumerate(windows.chunk(self.module.groups, dim=-1)):
                receive(group, own, None)

        return self.module.register_forward_pre_hook(give_windows).remove

    def trace(self, receive: Receive) -> Remove:
        """See `MatrixReader`."""
        return self.hook(receive)


@dataclass(frozen=True, eq=False)
class ExpertsReader:
    """A module that keeps all experts of a layer in two parameters: E gate and up matrices, then E down matrices."""

    module: Any
    matrices: tuple[StoredMatrix, ...]

    def hook(self, receive: Receive) -> Remove:
        """See `MatrixReader`."""
        num_experts = len(self.matrices) // 2

        def observe(routed: RoutedTokens) -> None:
            receive(routed.expert, routed.inputs, routed)
            receive(num_experts + routed.expert, routed.inner, routed)

        return self._replace_forward(partial(observed_experts_forward, self.module, observe))

    def trace(self, receive: Receive) -> Remove:
        """See `MatrixReader`; runs no expert, so that the shapes of meta tensors are enough."""

        def forward(hidden_states: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            nothing = hidden_states.new_zeros(0)
            for number, matrix in enumerate(self.matrices):
                empty = hidden_states.new_zeros(0, matrix.width)
                receive(number, empty, RoutedTokens(number, nothing.long(), nothing, empty, empty))
            return torch.zeros_like(hidden_states)

        return self._replace_forward(forward)

    def _replace_forward(self, forward: Callable[..., torch.Tensor]) -> Remove:
        assert "forward" not in self.module.__dict__, "gates on experts are closed before their inputs are recorded"
        self.module.forward = forward

        def restore() -> None:
            del self.module.forward

        return restore


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
            yield LinearReader(self._adapted.get(name, module), matrix)

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
            yield EmbeddingHeadReader(module.LayerNorm, StoredMatrix(name, None, num_tokens, width))


def _has_stacked_experts(module: nn.Module) -> bool:
    """Whether `moe.observed_experts_forward` can run a module."""
    names = ("gate_up_proj", "down_proj")
    if not all(isinstance(getattr(module, name, None), nn.Parameter) for name in names):
        return False
    return getattr(module, "has_gate", True) and not getattr(module, "has_post_expert_norm", False)
