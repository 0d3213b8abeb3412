"""Choices as token ids: what a model reads, and which of its predictions are those of the choice.

Context and choice are tokenized together, as one text, because tokens may begin with the space between them; the choice
begins after as many tokens as the context alone has, as in lm-evaluation-harness. White space at the end of a context
belongs to the choice. Special tokens are those that the tokenizer puts around a text, of which a decoder reads none
after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from das_ds.config import ObjectiveName
from das_ds.errors import DataError, ModelError

PROBE = "a"
"""A text in whose tokens the special ones are found."""
TEXTS_PER_CALL = 1000
MAX_SHOWN = 40
"""Characters of a choice in messages."""


@dataclass(frozen=True, slots=True)
class EncodedChoice:
    """Tokens of a context and its choice."""

    ids: npt.NDArray[np.int32]
    """(S,) special tokens included."""
    start: int
    """Position of the choice's first token."""
    stop: int
    """Position after its last token."""
    is_truncated: bool
    """Whether the beginning of the context was left out, because the model reads fewer tokens."""


class ChoiceEncoder:
    """Encodes choices for one model.

    Args:
        tokenizer: of the model.
        objective: of the model.
        max_length: largest number of tokens that it reads.

    Raises:
        ModelError: special tokens of the tokenizer cannot be told from those of the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, objective: ObjectiveName, max_length: int) -> None:
        self._tokenizer = tokenizer
        prefix, suffix = _find_special_ids(tokenizer)
        self._prefix = prefix
        self._suffix = [] if objective == "clm" else suffix
        # A decoder does not read the last token, which it predicts.
        self._max_length = max_length + 1 if objective == "clm" else max_length

    def encode(self, contexts: Sequence[str], continuations: Sequence[str]) -> Iterator[EncodedChoice]:
        """Tokens of contexts and choices; the beginning of a context is left out where they are too many.

        Raises:
            DataError: a choice has no token, or alone has more than the model reads.
            ModelError: an empty context, and a tokenizer without a token that could stand before a text.
        """
        for first in range(0, len(contexts), TEXTS_PER_CALL):
            chunk = slice(first, first + TEXTS_PER_CALL)
            texts = [context + choice for context, choice in zip(contexts[chunk], continuations[chunk], strict=True)]
            stripped = [context.rstrip() for context in contexts[chunk]]
            num_context_tokens = self._count_tokens(stripped)
            for ids, context, choice in zip(self._tokenize(texts), stripped, continuations[chunk], strict=True):
                yield self._assemble(ids, num_context_tokens[context], choice)

    def _assemble(self, ids: list[int], num_context: int, choice: str) -> EncodedChoice:
        # Without anything before it, a decoder would not predict the first token.
        prefix = self._prefix if self._prefix or num_context else [self._start_id()]
        room = self._max_length - len(prefix) - len(self._suffix)
        num_choice = len(ids) - num_context
        if not 0 < num_choice <= room:
            raise DataError(
                f"found {max(num_choice, 0)} tokens in the choice {choice[:MAX_SHOWN]!r}, expected at least one and at "
                f"most {room}, which the model reads"
            )
        kept = ids[-room:]
        stop = len(prefix) + len(kept)
        complete = np.array([*prefix, *kept, *self._suffix], dtype=np.int32)
        return EncodedChoice(complete, stop - num_choice, stop, len(kept) < len(ids))

    def _count_tokens(self, contexts: Sequence[str]) -> dict[str, int]:
        distinct = list(dict.fromkeys(contexts))
        return {context: len(ids) for context, ids in zip(distinct, self._tokenize(distinct), strict=True)}

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        # Not every tokenizer takes an empty text.
        filled = [text for text in texts if text]
        if not filled:
            return [[] for _ in texts]
        encoded = iter(self._tokenizer(filled, add_special_tokens=False, verbose=False)["input_ids"])
        return [next(encoded) if text else [] for text in texts]

    def _start_id(self) -> int:
        candidates = (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id)
        start: int | None = next((token for token in candidates if token is not None), None)
        if start is None:
            raise ModelError(
                f"tokenizer of {self._tokenizer.name_or_path}: found neither bos_token nor eos_token, expected one to "
                "stand before a choice without context"
            )
        return start


def _find_special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Tokens that a tokenizer puts before and after a text."""
    plain: list[int] = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    complete: list[int] = tokenizer(PROBE)["input_ids"]
    for first in range(len(complete) - len(plain) + 1):
        if plain and complete[first : first + len(plain)] == plain:
            return complete[:first], complete[first + len(plain) :]
    raise ModelError(
        f"tokenizer of {tokenizer.name_or_path}: found the tokens {complete} of {PROBE!r} with special tokens, and "
        f"{plain} without, expected these among those"
    )
