"""Tokenizers by corpus: `data.add_tokens` extends the tokenizer from domain to domain."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from das_ds.config import RunConfig
from das_ds.data.corpus import read_lines
from das_ds.errors import DataError, ModelError
from das_ds.functional.token_ids import tokens_in_holes

logger = logging.getLogger(__name__)


def build_tokenizers(config: RunConfig, base: PreTrainedTokenizerBase) -> dict[str, PreTrainedTokenizerBase]:
    """Corpus -> tokenizer: a domain's has the added tokens of all domains up to it, that of other corpora is the base.

    An added token matches complete words only. Tokens that the tokenizer already has are skipped with a warning.

    Raises:
        DataError: a token file that cannot be read, or tokens that are empty or given twice.
        ModelError: the ids of the tokenizer have holes that new tokens would fill.
    """
    tokenizers: dict[str, PreTrainedTokenizerBase] = {}
    current = base
    for domain in config.domains:
        if domain.name in config.data.add_tokens:
            tokens = _load_tokens(domain.name, config.data.add_tokens[domain.name])
            current = _add_tokens(current, domain.name, tokens)
        tokenizers[domain.name] = current
    for corpus in ([config.general] if config.general else []) + config.evaluate_on:
        tokenizers[corpus.name] = base
    return tokenizers


def _load_tokens(domain: str, source: list[str] | str) -> list[str]:
    tokens = _read_token_file(domain, source) if isinstance(source, str) else source
    if not tokens or not all(token.strip() for token in tokens):
        raise DataError(f"data.add_tokens.{domain}: found no token or an empty one; expected text in each")
    repeated = sorted({token for token in tokens if tokens.count(token) > 1})
    if repeated:
        raise DataError(f"data.add_tokens.{domain}: found more than once: {', '.join(repeated[:3])}")
    return tokens


def _read_token_file(domain: str, path: str) -> list[str]:
    try:
        words = [line.strip() for lines, _ in read_lines(Path(path)) for line in lines]
    except DataError as error:
        raise DataError(f"data.add_tokens.{domain}: {error}; expected one token per line") from error
    return [word for word in words if word]


def _add_tokens(tokenizer: PreTrainedTokenizerBase, domain: str, tokens: list[str]) -> PreTrainedTokenizerBase:
    known = [token for token in tokens if token in tokenizer.get_vocab()]
    if known:
        logger.warning("data.add_tokens.%s: already in the vocabulary, skipped: %s", domain, ", ".join(known))
    extended = copy.deepcopy(tokenizer)
    extended.add_tokens([AddedToken(token, single_word=True) for token in tokens if token not in known])
    if reused := tokens_in_holes(tokenizer.get_vocab(), extended.get_vocab()):
        raise ModelError(
            f"data.add_tokens.{domain}: the tokenizer's ids have holes, and {reused[0]!r} would get one that is in "
            f"use or has an old embedding; expected a tokenizer with ids from 0 to {len(tokenizer) - 1} without a gap"
        )
    return extended
