"""The best loss of a model that ignores its context in masked language modeling: the plateau to improve on.

Such a model knows the frequency of every token and, at a predicted position, sees only the token there: the mask
(80 %), a random token (10 %) or the true one (10 %). Both bounds are exact up to the estimate of the frequencies; V =
tokens of the vocabulary, N = held-out tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from das_ds.data.corpus import read_documents

MASKED = 0.8
RANDOM = 0.1
KEPT = 0.1
SMOOTHING = 0.5


@dataclass(frozen=True)
class ContextFreeBounds:
    """Held-out losses in nats per predicted token."""

    unigram: float
    """Cross-entropy of the token frequencies: nothing is seen at all."""
    context_free: float
    """The best loss of a model that sees the predicted position and no other; lower, for a tenth is left in place."""


def context_free_bounds(train_ids: Tensor, valid_ids_N: Tensor, num_tokens: int) -> ContextFreeBounds:
    """Bounds from the token frequencies p of the training text: unigram u = -mean log p(y), and with n tokens

        k(x) = 0.1 p(x) / (0.1 p(x) + 0.1 / n)                   probability that a visible token x is the true one
        b = 0.8 u + 0.1 E_y[-log(k(y) + (1 - k(y)) p(y))] + 0.1 E_x,y[-log q(y | x)]

    where x is uniform and q(y | x) = k(x) [x = y] + (1 - k(x)) p(y).

    Args:
        train_ids: (M,) long, ids of the training text in [0, n).
        valid_ids_N: (N,) long, ids of the held-out text in [0, n).
        num_tokens: n, the tokens that a random replacement is drawn from.
    """
    p = torch.bincount(train_ids, minlength=num_tokens).double() + SMOOTHING
    p /= p.sum()
    is_true = KEPT * p / (KEPT * p + RANDOM / num_tokens)
    log_p = p[valid_ids_N].log()
    repeated = is_true[valid_ids_N]
    unigram = -log_p.mean()
    kept = -(repeated + (1 - repeated) * log_p.exp()).log().mean()
    # Of the n tokens that may stand there by chance, one is the true one.
    elsewhere = -(1 - is_true).log().sum() + (1 - repeated).log().mean() + (num_tokens - 1) * unigram
    by_chance = (elsewhere + kept) / num_tokens
    return ContextFreeBounds(unigram.item(), (MASKED * unigram + KEPT * kept + RANDOM * by_chance).item())


def corpus_bounds(folder: Path, tokenizer: PreTrainedTokenizerBase) -> ContextFreeBounds:
    """Bounds of a corpus folder with train.jsonl and valid.jsonl."""
    train, valid = (_ordinary_ids(folder / f"{part}.jsonl", tokenizer) for part in ("train", "valid"))
    return context_free_bounds(train, valid, len(tokenizer) - len(tokenizer.all_special_ids))


def _ordinary_ids(path: Path, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Token ids of a file, counted without the special tokens, which the demo's tokenizer has first."""
    texts = [text for batch in read_documents(path, "text") for text in batch.texts]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in ids]) - len(tokenizer.all_special_ids)
