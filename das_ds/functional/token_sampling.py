"""Sampling tokens from logits, and the documents and masked groups of what is sampled, as functions of given draws.

Shape legend: N positions, V vocabulary, B sequences, S tokens per sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from das_ds.functional.sampling import sample_generator

RESOLUTION = 2**40
"""Probabilities are integer multiples of its inverse: integers add up to the same sum in any order, so that a GPU,
whose floating-point cumulative sums differ from call to call, samples the same tokens again."""


def sample_tokens(logits: Tensor, uniforms: Tensor, *, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """One token per position, by inversion: the first token v with p_0 + ... + p_v > u, p = softmax(z / temperature).

    With top_p < 1 only the most likely tokens, as few as have that probability together, keep theirs (nucleus
    sampling, Holtzman et al., ICLR 2020). Tokens stay in the order of their ids, so that rounding of the logits changes
    a token only where u is within that rounding of a sum.

    Args:
        logits: (N, V) float, -inf for tokens that are never sampled.
        uniforms: (N,) float64, in [0, 1).
        temperature: above 0.
        top_p: in (0, 1].

    Returns:
        (N,) int64.
    """
    weights = ((logits.double() / temperature).softmax(dim=1) * RESOLUTION).long()
    if top_p < 1.0:
        ordered, order = weights.sort(dim=1, descending=True, stable=True)
        likelier = ordered.cumsum(dim=1) - ordered
        in_nucleus = likelier < top_p * weights.sum(dim=1, keepdim=True)
        weights = torch.zeros_like(weights).scatter(1, order, ordered * in_nucleus)
    sums = weights.cumsum(dim=1)
    totals = sums[:, -1:]
    drawn = (uniforms[:, None] * totals).long().minimum(totals - 1)
    return torch.searchsorted(sums, drawn, right=True).squeeze(1)


def sample_uniforms(seed: int, stream: str, numbers: Sequence[int], length: int) -> NDArray[np.float64]:
    """Uniforms in [0, 1) for every token of some samples, a pure function of each number; (len(numbers), length)."""
    return np.stack([sample_generator(seed, f"{stream}/tokens", number).random(length) for number in numbers])


def infill_groups(seed: int, stream: str, numbers: Sequence[int], length: int, count: int) -> NDArray[np.int64]:
    """Group of every token of some samples: a random partition into `count` groups of equal size, to within one.

    Returns:
        (len(numbers), length), from 0 to count - 1.
    """
    orders = [sample_generator(seed, f"{stream}/groups", number).permutation(length) for number in numbers]
    return np.stack(orders) % count


def document_starts(tokens: Tensor, end: int, *, begins_with_end: bool) -> Tensor:
    """Which tokens begin a document: the first one of every sequence, and those after the token that ends documents.

    Args:
        tokens: (B, S) int64.
        end: id of the token that ends documents.
        begins_with_end: documents begin with that token as well (OPT), which does not end them there.

    Returns:
        (B, S) bool.
    """
    is_start = torch.zeros_like(tokens, dtype=torch.bool)
    is_start[:, 0] = True
    for position in range(1, tokens.shape[1]):
        is_start[:, position] = ends_document(
            tokens[:, position - 1], is_start[:, position - 1], end, begins_with_end=begins_with_end
        )
    return is_start


def ends_document(tokens: Tensor, is_first: Tensor, end: int, *, begins_with_end: bool) -> Tensor:
    """Which tokens (B,) are the last of their document, given which are its first (B,), see `document_starts`."""
    ends = tokens == end
    return ends & ~is_first if begins_with_end else ends
