"""Mixture-of-experts layers whose experts' intermediate units can be gated.

transformers keeps all experts of a layer in two 3-D parameters and runs them in one function, so that there is no
module whose output a hook could multiply; while gates are on, the function below takes its place.

Shape legend: T tokens, H hidden size, X experts of each token, E experts, I units of an expert; n tokens of one.
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
        num_rows: rows that the T tokens are, row by row.
        hidden_states: (T, H).
        top_k_index: (T, X) int64.
        top_k_weights: (T, X).

    Returns:
        (T, H).
    """
    num_experts, width, _ = experts.gate_up_proj.shape
    output = torch.zeros_like(hidden_states)
    row_of = torch.arange(len(hidden_states), device=hidden_states.device) // (len(hidden_states) // num_rows)
    for expert in range(num_experts):
        # An expert without tokens runs on none: its weights still take part in the graph.
        tokens, place = torch.where(top_k_index == expert)
        first, second = functional.linear(hidden_states[tokens], experts.gate_up_proj[expert]).chunk(2, dim=-1)
        inner = experts.act_fn(first) * second
        for gate in gates:
            inner = gate(inner, row_of[tokens], expert * width // 2)
        outer = functional.linear(inner, experts.down_proj[expert]) * top_k_weights[tokens, place, None]
        output = output.index_add(0, tokens, outer.to(output.dtype))
    return output


def measure_routed(
    x: torch.Tensor, anchor: torch.Tensor, sums: torch.Tensor, row_weights: torch.Tensor, sequences: torch.Tensor
) -> torch.Tensor:
    """x itself; its backward pass adds w_b * |sum over tokens of sequence b of dy * x| to sums[b].

    Args:
        x: (n, I).
        anchor: scalar to differentiate by.
        sums: (B, I) float32, a view.
        row_weights: (B,) float32.
        sequences: (n,) int64, the sequence of each token, whatever view of it.
    """
    same: torch.Tensor = _Measure.apply(x, anchor, sums, row_weights, sequences)
    return same


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
        ctx.sums, ctx.row_weights, ctx.sequences = sums, row_weights, sequences
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        (dy,) = grad_outputs
        x, anchor = ctx.saved_tensors
        gradient = torch.zeros_like(ctx.sums).index_add_(0, ctx.sequences, dy.float() * x.float())
        ctx.sums.addcmul_(gradient.abs(), ctx.row_weights[:, None])
        return dy, torch.zeros_like(anchor), None, None, None
