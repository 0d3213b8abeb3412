"""Embeddings with room for the tokens of all domains.

An engine cannot grow a parameter, so rows of later tokens are reserved from the start. Until their domain they take no
part: no text holds them, logits end before them (`LanguageModel.num_rows`), exports leave them out, and after every
domain they are the mean of the rows learned, as if they were added only then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from das_ds.functional.token_ids import mean_init_rows


@dataclass(frozen=True)
class Vocabulary:
    """Sizes of a vocabulary that grows."""

    base_rows: int
    """Rows of the model's embedding before the first domain; may be more than there are tokens."""
    base_tokens: int
    """Tokens before the first domain."""
    num_tokens: dict[str, int]
    """Corpus -> tokens of its tokenizer."""

    @property
    def total(self) -> int:
        """Tokens after the last domain."""
        return max(self.base_tokens, *self.num_tokens.values())

    def rows(self, corpus: str) -> int:
        """Rows of the embedding that would be there if it had been grown for this corpus and no further."""
        return max(self.base_rows, self.num_tokens[corpus])


def vocabulary_parameters(model: PreTrainedModel) -> list[str]:
    """Parameters with one row per token: input embedding, LM head and its bias, each named once if tied."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    meant = {id(p) for module in modules if module is not None for p in module.parameters(recurse=False)}
    return [name for name, parameter in model.named_parameters() if id(parameter) in meant]


def reserve_embedding_rows(model: PreTrainedModel, known: int, total: int) -> None:
    """Make room for `total` tokens, of which rows [known, total) become the mean of the known."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    num_rows = max(total, embedding.num_embeddings)
    parameters = dict(model.named_parameters())
    for name in vocabulary_parameters(model):
        # In place: transformers' own resizing makes new parameters, and some tied ones come out under another name.
        weight = parameters[name].data
        grown = torch.cat((weight, weight.new_empty(num_rows - len(weight), *weight.shape[1:])))
        parameters[name].data = mean_init_rows(grown, known, total)
    embedding.num_embeddings = head.out_features = model.config.get_text_config().vocab_size = num_rows


@contextmanager
def override_vocab_size(model: PreTrainedModel, num_rows: int) -> Iterator[None]:
    """Inside, the model's config names this size of the vocabulary, for a copy of the model that has it."""
    config = model.config.get_text_config()
    actual = config.vocab_size
    config.vocab_size = num_rows
    try:
        yield
    finally:
        config.vocab_size = actual
