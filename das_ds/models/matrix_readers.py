"""Matrix readers: the modules of a network that multiply an input by a trained matrix, y = W x.

One reader per module. Together they know for every kind of layer where its matrices lie in their parameters, and what
exactly each of them multiplies: a hook reaches the input of a linear layer, but not the windows of a convolution, nor
the tokens that a router sends to an expert.

Shape legend: d width of an input, o of an output; R rows of a batch, S positions, T = R S tokens, E experts, H hidden
size, I units of an expert, n tokens of one expert; k size of a convolution's kernel, G its groups, C its channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from das_ds.models.moe import RoutedTokens, observed_experts_forward

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


@dataclass(frozen=True, eq=False)
class MatrixReader(ABC):
    """A module, and the matrices that it multiplies by."""

    module: nn.Module
    matrices: tuple[StoredMatrix, ...]
    """In a fixed order."""

    @abstractmethod
    def hook(self, receive: Receive) -> Remove:
        """From now on every call of the module gives `receive` what each of the matrices multiplies."""

    def trace(self, receive: Receive) -> Remove:
        """Like `hook`, but for the shapes only: what the module returns has to be of the right shape and no more."""
        return self.hook(receive)


class LinearReader(MatrixReader):
    """A module that multiplies its input (..., d) by one matrix: a linear layer, or the router of experts.

    For LoRA's A the module is the adapted layer: A reads a copy of that layer's input.
    """

    def hook(self, receive: Receive) -> Remove:
        """See `MatrixReader`."""
        return self.module.register_forward_pre_hook(lambda _, inputs: receive(0, inputs[0], None)).remove


class OutputReader(MatrixReader):
    """A module whose output (..., d) its caller multiplies by one matrix: in DeBERTa's newer LM head the embeddings."""

    def hook(self, receive: Receive) -> Remove:
        """See `MatrixReader`."""
        return self.module.register_forward_hook(lambda _, __, output: receive(0, output, None)).remove


class ConvolutionReader(MatrixReader):
    """A convolution over positions: a linear layer whose input are windows, d = (C / G) k, one matrix for each group.

    A window has its channels one after the other, and the k positions of a channel in a row, like the stored weight.
    """

    module: nn.Conv1d

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


class ExpertsReader(MatrixReader):
    """A module that keeps all experts of a layer in two parameters: E gate and up matrices, then E down matrices."""

    module: Any

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
