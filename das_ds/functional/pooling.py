"""Pooling of hidden states to one vector per row.

Shape legend: B rows, S positions, H hidden size.
"""

from __future__ import annotations

from typing import Literal

import torch

Pooling = Literal["mean", "last"]


def pooling_weights(
    kind: Pooling,
    *,
    num_rows: int,
    num_positions: int,
    position_ids: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Weights w with pooled_b = sum_s w_bs hidden_bs.

    `mean`: 1/n at each of the row's n tokens. `last`: 1/d at the last token of each of the row's d documents, which
    under causal attention is the only one that has read its whole document. Padding has weight 0 and is no token; a
    document of nothing but padding does not count, and a row of nothing else gets weight 0 everywhere.

    Args:
        kind: which tokens count.
        num_rows: B.
        num_positions: S.
        position_ids: (B, S) int64, 0 where a document begins; None: each row is one document.
        padding: (B, S) bool, True where there is no token; None: all are tokens.
        device: of the weights; must be that of the tensors given.

    Returns:
        (B, S) float32, summing to 1 over each row.
    """
    shape = (num_rows, num_positions)
    is_token = torch.ones(shape, dtype=torch.bool, device=device) if padding is None else ~padding
    chosen = is_token if kind == "mean" else _is_last_token(is_token, position_ids)
    return chosen.float() / chosen.sum(dim=1, keepdim=True).clamp_min(1)


def _is_last_token(is_token: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
    """(B, S) bool, True at the last token of each document that has one."""
    places = torch.arange(is_token.shape[1], device=is_token.device).expand_as(is_token)
    if position_ids is None:
        document = torch.zeros_like(places)
    else:
        # A row may begin in the middle of a document; the first number is then 0 and no other document has it.
        starts = position_ids == 0
        document = starts.cumsum(dim=1) - starts[:, :1].long()
    last = torch.full_like(places, -1).scatter_reduce(1, document, places.masked_fill(~is_token, -1), "amax")
    return places == last.gather(1, document)


def pool(hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum over positions, in float32: hidden (B, S, H), weights (B, S) float32 -> (B, H) float32."""
    return torch.einsum("bs,bsh->bh", weights, hidden.float())
