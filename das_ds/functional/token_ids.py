"""Rows of tokens that a vocabulary gains.

Shape legend: E rows of a parameter with one row per token, C columns.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch


def num_tokens(vocabulary: Mapping[str, int]) -> int:
    """Rows that an embedding needs: the largest id plus one, which is more than there are tokens where ids have holes.

    Args:
        vocabulary: token -> id, as from a tokenizer's `get_vocab`.
    """
    return max(vocabulary.values(), default=-1) + 1


def tokens_by_id(vocabulary: Mapping[str, int]) -> tuple[str, ...]:
    """Every token at the place of its id; "" where there is none."""
    tokens = [""] * num_tokens(vocabulary)
    for token, number in vocabulary.items():
        tokens[number] = token
    return tuple(tokens)


def tokens_in_holes(before: Mapping[str, int], after: Mapping[str, int]) -> list[str]:
    """New tokens whose id is below `num_tokens(before)`, by id.

    Tokenizers number new tokens from their count, which is an old token's id where ids have holes.
    """
    known = num_tokens(before)
    return sorted((token for token in after if token not in before and after[token] < known), key=after.__getitem__)


def mean_init_rows(weight: torch.Tensor, known: int, total: int) -> torch.Tensor:
    """A copy in which rows [known, total) are the mean of rows [0, known), taken in float64.

    Args:
        weight: (E, C), or (E,) for a bias.
        known: tokens that have been learned.
        total: tokens there will be; at most E.
    """
    filled = weight.clone()
    filled[known:total] = weight[:known].mean(dim=0, dtype=torch.float64).to(weight.dtype)
    return filled
