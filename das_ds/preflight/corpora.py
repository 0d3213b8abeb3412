"""Whether the text is there: every source of every corpus is opened, and read until it has the blocks it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from das_ds.config import CorpusConfig, RunConfig
from das_ds.data.blocks import check_valid_is_held_out
from das_ds.data.corpus import read_documents
from das_ds.data.objectives import end_of_text
from das_ds.data.sources import Source, find_shared_sources, resolve_source
from das_ds.data.tokenize import UnknownCounter, UnknownTokens, build_backend, check_unknown_tokens, count_tokens
from das_ds.data.tokenizers import build_tokenizers
from das_ds.errors import DasError, DataError, PreflightError
from das_ds.models.loading import find_spec, load_tokenizer
from das_ds.preflight.checks import Checklist, CheckWarning, readable
from das_ds.training.data_module import eval_corpora

FIRST_DOCUMENTS = 200
"""Documents of each source that are tokenised."""


@dataclass(frozen=True)
class Opened:
    """What one rank found."""

    sources: list[Source]
    unknown: dict[str, UnknownTokens]
    """Corpus -> unknown tokens among the first documents of its sources; {} without a tokeniser."""


def check_corpora(checks: Checklist, config: RunConfig) -> None:
    """Every rank reads: each of them opens all text later."""
    corpora = eval_corpora(config)

    def look() -> Opened:
        reading = _reading(config)
        sources: list[Source] = []
        unknown: dict[str, UnknownTokens] = {}
        for corpus in corpora:
            counter = None if reading is None else UnknownCounter(build_backend(reading[0][corpus.name]))
            sources += _opened(corpus, config, reading, counter)
            if counter is not None:
                unknown[corpus.name] = counter.total
        return Opened(sources, unknown)

    def check_loss(found: list[Opened]) -> str | CheckWarning:
        first = found[0]
        if any(list(map(str, other.sources)) != list(map(str, first.sources)) for other in found):
            raise PreflightError("globs and names stand for different files on different ranks")
        num_bytes = sum(source.stat().st_size for source in first.sources if isinstance(source, Path))
        summary = f"{len(corpora)} corpora, {len(first.sources)} sources, {readable(num_bytes)} of files"
        if first.unknown:
            shares = ", ".join(f"{name} {unknown.fraction:.1%}" for name, unknown in first.unknown.items())
            summary += f", unknown tokens in the first documents: {shares}"
        trained_on = _trained_on(config, corpora)
        return CheckWarning(f"{summary}; {trained_on}") if trained_on else summary

    checks.run(
        "corpora", "text in every source, a block of tokens in every part, none of it held out twice", look, check_loss
    )


Reading = tuple[dict[str, PreTrainedTokenizerBase], bool]
"""Tokenisers by corpus, and whether documents end in an end-of-text token."""


def _reading(config: RunConfig) -> Reading | None:
    """How text becomes tokens; None where the model or tokeniser cannot be used, which another check says."""
    try:
        return build_tokenizers(config, load_tokenizer(config)), find_spec(config.model).objective == "clm"
    except DasError:
        return None


def _opened(
    corpus: CorpusConfig, config: RunConfig, reading: Reading | None, counter: UnknownCounter | None
) -> list[Source]:
    check_valid_is_held_out(corpus)
    try:
        train, valid = (
            [source for name in names for source in resolve_source(name)] for names in (corpus.train, corpus.valid)
        )
        for source in (*train, *valid):
            _read_first(source, corpus.text_column, counter)
        if counter is not None:
            check_unknown_tokens(counter.total)
        if reading is not None:
            # Without valid, a second block is held out.
            _check_length(corpus, config, reading, train, num_blocks=1 if valid else 2)
            _check_length(corpus, config, reading, valid, num_blocks=1)
    except DataError as error:
        raise DataError(f"corpus '{corpus.name}': {error}") from error
    return [*train, *valid]


def _check_length(
    corpus: CorpusConfig, config: RunConfig, reading: Reading, sources: Sequence[Source], num_blocks: int
) -> None:
    """Raises DataError where there is text, but less of it than a run needs."""
    if not sources:
        return
    tokenizers, ends_documents = reading
    tokenizer, needed = tokenizers[corpus.name], num_blocks * config.data.sequence_length
    num_tokens = count_tokens(
        sources,
        text_column=corpus.text_column,
        tokenizer=tokenizer,
        end_of_text=end_of_text(tokenizer) if ends_documents else None,
        limit=needed,
    )
    if num_tokens < needed:
        held_out = ", one to train on and one to hold out" if num_blocks == 2 else ""
        raise DataError(
            f"found {num_tokens} tokens in {', '.join(map(str, sources))}; expected at least {needed}, {num_blocks} x "
            f"data.sequence_length {config.data.sequence_length}{held_out}"
        )


def _trained_on(config: RunConfig, corpora: list[CorpusConfig]) -> str:
    """Held-out text of one corpus that another one trains on, in words; empty: there is none."""
    for domain, corpus in product(config.domains, corpora):
        if domain.name != corpus.name and (shared := find_shared_sources(corpus.valid, domain.train)):
            return f"{shared[0]} is held out for {corpus.name}, but domain {domain.name} trains on it"
    return ""


def _read_first(source: Source, text_column: str, counter: UnknownCounter | None) -> None:
    """Raises DataError where no document can be read."""
    documents = next((batch.texts for batch in read_documents(source, text_column) if batch.texts), None)
    if documents is None:
        raise DataError(f"no text in {source}; expected at least one line that is not blank")
    if counter is not None:
        counter.add_texts(documents[:FIRST_DOCUMENTS])
