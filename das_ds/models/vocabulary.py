"""Vocabulary growth: embeddings with rows reserved for the tokens that later domains add.

An engine cannot grow a parameter, so all rows are reserved from the start. Until their domain they are inactive: no
text contains their tokens, logits end before them (`LanguageModel.num_rows`), exports leave them out, and after every
domain they are reset to the mean of the learned rows, as if they were added only then.

Shape legend: E rows of a parameter with one row per token, C columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Vocabulary:
    """Sizes of a growing vocabulary."""

    base_rows: int
    """Rows of the model's embedding before the first domain; may be more than there are tokens."""
    base_tokens: int
    """Tokens before the first domain."""
    num_tokens: dict[str, int]
    """Corpus -> number of tokens of its tokenizer."""

    @property
    def total(self) -> int:
        """Tokens after the last domain."""
        return max(self.base_tokens, *self.num_tokens.values())

    def rows(self, corpus: str) -> int:
        """Rows that the embedding would have if it had been grown up to this corpus only."""
        return max(self.base_rows, self.num_tokens[corpus])


def vocabulary_parameters(model: PreTrainedModel) -> list[str]:
    """Parameters with one row per token: input embedding, LM head and its bias, each named once if tied."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    ids = {id(p) for module in modules if module is not None for p in module.parameters(recurse=False)}
    return [name for name, parameter in model.named_parameters() if id(parameter) in ids]


def mean_init_rows(weight: torch.Tensor, known: int, total: int) -> torch.Tensor:
    """A copy in which rows [known, total) are the mean of rows [0, known), computed in float64.

    Args:
        weight: (E, C), or (E,) for a bias.
        known: number of learned tokens.
        total: number of tokens after growth; at most E.
    """
    filled = weight.clone()
    filled[known:total] = weight[:known].mean(dim=0, dtype=torch.float64).to(weight.dtype)
    return filled


def reserve_embedding_rows(model: PreTrainedModel, known: int, total: int) -> None:
    """Grow the embeddings, in place, to `total` tokens; rows [known, total) become the mean of the known ones."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    num_rows = max(total, embedding.num_embeddings)
    parameters = dict(model.named_parameters())
    for name in vocabulary_parameters(model):
        # In place: transformers' own resizing creates new parameters, and renames some of the tied ones.
        weight = parameters[name].data
        grown = torch.cat((weight, weight.new_empty(num_rows - len(weight), *weight.shape[1:])))
        parameters[name].data = mean_init_rows(grown, known, total)
    embedding.num_embeddings = num_rows
    head.out_features = num_rows
    model.config.get_text_config().vocab_size = num_rows


@contextmanager
def override_vocab_size(model: PreTrainedModel, num_rows: int) -> Iterator[None]:
    """Inside, the model's config has this `vocab_size`, for saving a copy of the model of that size."""
    config = model.config.get_text_config()
    actual = config.vocab_size
    config.vocab_size = num_rows
    try:
        yield
    finally:
        config.vocab_size = actual
