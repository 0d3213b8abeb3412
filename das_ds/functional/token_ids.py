"""Token ids of a vocabulary: how many rows an embedding needs, tokens in the order of their ids, reused ids."""

from __future__ import annotations

from collections.abc import Mapping


def num_tokens(vocabulary: Mapping[str, int]) -> int:
    """Rows that an embedding needs: the largest id plus one, more than the number of tokens where ids have gaps.

    Args:
        vocabulary: token -> id, as from a tokenizer's `get_vocab`.
    """
    return max(vocabulary.values(), default=-1) + 1


def tokens_by_id(vocabulary: Mapping[str, int]) -> tuple[str, ...]:
    """Token at the index of its id; "" for an id without token."""
    tokens = [""] * num_tokens(vocabulary)
    for token, number in vocabulary.items():
        tokens[number] = token
    return tuple(tokens)


def tokens_in_holes(before: Mapping[str, int], after: Mapping[str, int]) -> list[str]:
    """New tokens whose id is below `num_tokens(before)`, by id.

    Tokenizers number new tokens from their count, which is the id of an old token if the ids have gaps.
    """
    known = num_tokens(before)
    return sorted((token for token in after if token not in before and after[token] < known), key=after.__getitem__)
