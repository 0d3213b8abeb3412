"""Mixture-of-experts forward pass with gates on the experts' intermediate units.

transformers keeps all experts of a layer in two 3-D parameters and runs them in one function, so that no module exists
whose output a hook could multiply; while gates are on, `gated_experts_forward` replaces that function.

Shape legend: T tokens, H hidden size, X experts per token, E experts, I units of an expert; n tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

RoutedGate = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""(n, I) values, (n,) rows, first unit -> (n, I)."""


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
        experts: a module with `gate_up_proj` (E, 2I, H), `down_proj` (E, H, I) and `act_fn`.
        gates: applied one after the other to the input of the down projection.
        num_rows: rows of the batch; the T tokens are stored row by row.
        hidden_states: (T, H).
        top_k_index: (T, X) int64.
        top_k_weights: (T, X).

    Returns:
        (T, H).
    """
    num_experts, width, _ = experts.gate_up_proj.shape
    output = torch.zeros_like(hidden_states)
    # (T,): the row of each token.
    token_rows = torch.arange(len(hidden_states), device=hidden_states.device) // (len(hidden_states) // num_rows)
    for expert in range(num_experts):
        # An expert without tokens runs on zero rows, so that its weights stay part of the graph.
        tokens, slots = torch.where(top_k_index == expert)  # both (n,)
        gated, up = functional.linear(hidden_states[tokens], experts.gate_up_proj[expert]).chunk(2, dim=-1)
        inner = experts.act_fn(gated) * up
        for gate in gates:
            inner = gate(inner, token_rows[tokens], expert * width // 2)
        outer = functional.linear(inner, experts.down_proj[expert]) * top_k_weights[tokens, slots, None]
        output = output.index_add(0, tokens, outer.to(output.dtype))
    return output


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
