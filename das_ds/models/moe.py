"""Mixture-of-experts forward pass with gates on the experts' intermediate units, or with their inputs observed.

transformers keeps all experts of a layer in two 3-D parameters and runs them in one function, so that no module exists
whose input or output a hook could reach; a function of this module replaces that function for as long as it is needed.

Shape legend: T tokens, H hidden size, X experts per token, E experts, I units of an expert; n tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

RoutedGate = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""(n, I) values, (n,) rows, first unit -> (n, I)."""


@dataclass(frozen=True)
class RoutedTokens:
    """The tokens of one expert in one forward pass."""

    expert: int
    tokens: torch.Tensor
    """(n,) int64, which of the T tokens."""
    weights: torch.Tensor
    """(n,) w, by which the expert's output for each of them is multiplied."""
    inputs: torch.Tensor
    """(n, H), of the gate and up projection."""
    inner: torch.Tensor
    """(n, I), of the down projection: act(gate x) * up x."""


def is_transposed(experts: Any) -> bool:
    """Whether the matrices of experts are stored as (inputs, outputs), as in GPT-OSS, and not as (outputs, inputs)."""
    return bool(getattr(experts, "is_transposed", False))


def gated_experts_forward(
    experts: Any,
    gates: Sequence[RoutedGate],
    num_rows: int,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """out_t = sum over the token's experts e of w_te * down_e(gate(act(gate_e x_t) * up_e x_t)).

    Args:
        experts: a module with `gate_up_proj` (E, 2I, H), `down_proj` (E, H, I) and `act_fn`; see `is_transposed`.
        gates: applied one after the other to the input of the down projection.
        num_rows: rows of the batch; the T tokens are stored row by row.
        hidden_states: (T, H).
        top_k_index: (T, X) int64.
        top_k_weights: (T, X).

    Returns:
        (T, H).
    """
    # (T,): the row of each token.
    token_rows = torch.arange(len(hidden_states), device=hidden_states.device) // (len(hidden_states) // num_rows)
    output = torch.zeros_like(hidden_states)
    for routed in _route(experts, hidden_states, top_k_index, top_k_weights):
        inner = routed.inner
        for gate in gates:
            inner = gate(inner, token_rows[routed.tokens], routed.expert * inner.shape[1])
        output = _add_expert(experts, output, routed, inner)
    return output


def observed_experts_forward(
    experts: Any,
    observe: Callable[[RoutedTokens], None],
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The experts' output, as of `gated_experts_forward` without gates, after each expert's inputs were observed."""
    output = torch.zeros_like(hidden_states)
    for routed in _route(experts, hidden_states, top_k_index, top_k_weights):
        observe(routed)
        output = _add_expert(experts, output, routed, routed.inner)
    return output


def _route(
    experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> Iterator[RoutedTokens]:
    """The tokens of each expert in turn."""
    for expert in range(len(experts.gate_up_proj)):
        # An expert without tokens runs on zero rows, so that its weights stay part of the graph.
        tokens, slots = torch.where(top_k_index == expert)  # both (n,)
        inputs = hidden_states[tokens]
        products = _multiply(experts, "gate_up_proj", expert, inputs)
        if hasattr(experts, "_apply_gate"):
            inner = experts._apply_gate(products)
        else:
            gated, up = products.chunk(2, dim=-1)
            inner = experts.act_fn(gated) * up
        yield RoutedTokens(expert, tokens, top_k_weights[tokens, slots], inputs, inner)


def _add_expert(experts: Any, output: torch.Tensor, routed: RoutedTokens, inner: torch.Tensor) -> torch.Tensor:
    """The output (T, H) with the part of one expert added."""
    outer = _multiply(experts, "down_proj", routed.expert, inner) * routed.weights[:, None]
    return output.index_add(0, routed.tokens, outer.to(output.dtype))


def _multiply(experts: Any, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
    """(n, inputs) -> (n, outputs) by one of an expert's matrices, and its bias if it has one."""
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias", None)
    return functional.linear(x, weight.T if is_transposed(experts) else weight, None if bias is None else bias[expert])


def measure_routed(
    x: torch.Tensor, anchor: torch.Tensor, sums: torch.Tensor, row_weights: torch.Tensor, sequences: torch.Tensor
) -> torch.Tensor:
    """Identity; the backward pass adds w_b |sum over tokens t of sequence b of dy_t x_t| to sums[b].

    Args:
        x: (n, I).
        anchor: scalar to differentiate by.
        sums: (B, I) float32, a view; added to.
        row_weights: (B,) float32.
        sequences: (n,) int64, the sequence of each token; all views of a sequence count together.
    """
    y: torch.Tensor = _Measure.apply(x, anchor, sums, row_weights, sequences)
    return y


class _Measure(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        anchor: torch.Tensor,
        sums: torch.Tensor,
        row_weights: torch.Tensor,
        sequences: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, anchor)
        ctx.sums = sums
        ctx.row_weights = row_weights
        ctx.sequences = sequences
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        (dy,) = grad_outputs
        x, anchor = ctx.saved_tensors
        # dL/dg of a gate is the sum of dy * x over the tokens that it multiplies, in float32.
        gradient = torch.zeros_like(ctx.sums).index_add_(0, ctx.sequences, dy.float() * x.float())
        ctx.sums.addcmul_(gradient.abs(), ctx.row_weights[:, None])
        return dy, torch.zeros_like(anchor), None, None, None
