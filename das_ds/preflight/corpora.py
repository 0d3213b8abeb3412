"""Preflight check of the corpora: every source is opened, and read until it has the blocks that a run needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from das_ds.config import CorpusConfig, RunConfig
from das_ds.data.blocks import check_valid_is_held_out
from das_ds.data.corpus import read_documents
from das_ds.data.encoder import DocumentEncoder, UnknownTokens
from das_ds.data.objectives import end_of_text
from das_ds.data.sources import Source, find_shared_sources, resolve_source
from das_ds.data.tokenize import build_backend, check_unknown_tokens, count_tokens
from das_ds.data.tokenizers import build_tokenizers
from das_ds.errors import DasError, DataError, PreflightError
from das_ds.models.loading import find_spec, load_tokenizer
from das_ds.preflight.checks import Checklist, CheckWarning, format_bytes
from das_ds.training.data_module import eval_corpora, explain_missing_text

FIRST_DOCUMENTS = 200
"""Documents of each source that are tokenized to count unknown tokens."""

Tokenization = tuple[dict[str, PreTrainedTokenizerBase], bool]
"""Corpus -> tokenizer, and whether documents end with an end-of-text token."""


@dataclass(frozen=True)
class CorpusScan:
    """Findings of one rank in the corpora."""

    sources: list[Source]
    unknown: dict[str, UnknownTokens]
    """Corpus -> unknown tokens in the first documents of its sources; {} without a tokenizer."""


def check_corpora(checks: Checklist, config: RunConfig) -> None:
    """Every rank reads all corpora, because every rank opens all text during training."""
    corpora = eval_corpora(config)

    def probe() -> CorpusScan:
        tokenization = _find_tokenization(config)
        sources: list[Source] = []
        unknown: dict[str, UnknownTokens] = {}
        for corpus in corpora:
            encoder = (
                None if tokenization is None else DocumentEncoder(build_backend(tokenization[0][corpus.name]), None)
            )
            try:
                sources += _scan_corpus(corpus, config, tokenization, encoder)
            except DataError as error:
                raise explain_missing_text(config, corpus, error) from error
            if encoder is not None:
                unknown[corpus.name] = encoder.unknown
        return CorpusScan(sources, unknown)

    def summarize(scans: list[CorpusScan]) -> str | CheckWarning:
        first = scans[0]
        if any(list(map(str, scan.sources)) != list(map(str, first.sources)) for scan in scans):
            raise PreflightError("paths resolve to different files on different ranks")
        num_bytes = sum(source.stat().st_size for source in first.sources if isinstance(source, Path))
        summary = f"{len(corpora)} corpora, {len(first.sources)} sources, {format_bytes(num_bytes)} of files"
        if first.unknown:
            shares = ", ".join(f"{name} {unknown.fraction:.1%}" for name, unknown in first.unknown.items())
            summary += f", unknown tokens in the first documents: {shares}"
        leak = _find_leak(config, corpora)
        return CheckWarning(f"{summary}; {leak}") if leak else summary

    expected = "text in every source, a block of tokens in every split, and no held-out text that is trained on"
    checks.run("corpora", expected, probe, summarize)


def _find_tokenization(config: RunConfig) -> Tokenization | None:
    """None if the model or tokenizer cannot be used, which `check_model` reports."""
    try:
        return build_tokenizers(config, load_tokenizer(config)), find_spec(config.model).objective == "clm"
    except DasError:
        return None


def _scan_corpus(
    corpus: CorpusConfig, config: RunConfig, tokenization: Tokenization | None, encoder: DocumentEncoder | None
) -> list[Source]:
    """All sources of a corpus.

    Raises:
        DataError: a source cannot be read, or there is too little text.
    """
    check_valid_is_held_out(corpus)
    try:
        # Text and its column of every split: the sources of a mixture each have blocks of their own.
        splits = [(source.train, source.text_column or corpus.text_column) for source in corpus.training_sources]
        # Without `valid`, a second block of the training text is held out.
        num_blocks = [1 if corpus.valid else 2] * len(splits)
        if corpus.valid:
            splits.append((corpus.valid, corpus.text_column))
            num_blocks.append(1)
        resolved = [([source for name in names for source in resolve_source(name)], column) for names, column in splits]
        # Valid text, which comes last, is not streamed.
        streamed = [source.streaming for source in corpus.training_sources] + [False] * bool(corpus.valid)
        for (sources, column), is_streamed in zip(resolved, streamed, strict=True):
            # Of a stream, which may have thousands of sources, only the first.
            for source in sources[:1] if is_streamed else sources:
                _read_first(source, column, encoder)
        if encoder is not None:
            check_unknown_tokens(encoder.unknown)
        if tokenization is not None:
            for (sources, column), needed, is_streamed in zip(resolved, num_blocks, streamed, strict=True):
                # A stream begins again at its end.
                if is_streamed:
                    continue
                _check_length(corpus.name, column, config, tokenization, sources, needed)
    except DataError as error:
        raise DataError(f"corpus '{corpus.name}': {error}") from error
    return [source for sources, _ in resolved for source in sources]


def _check_length(
    corpus: str,
    text_column: str,
    config: RunConfig,
    tokenization: Tokenization,
    sources: Sequence[Source],
    num_blocks: int,
) -> None:
    """Raises DataError if there is less text than a run needs."""
    tokenizers, ends_documents = tokenization
    tokenizer = tokenizers[corpus]
    needed = num_blocks * config.data.sequence_length
    num_tokens = count_tokens(
        sources,
        text_column=text_column,
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


def _find_leak(config: RunConfig, corpora: list[CorpusConfig]) -> str:
    """A description of held-out text that another domain trains on; empty if there is none."""
    for domain, corpus in product(config.readable_domains, corpora):
        if domain.name != corpus.name and (shared := find_shared_sources(corpus.valid, domain.training_text)):
            return f"{shared[0]} is held out for {corpus.name}, but domain {domain.name} trains on it"
    return ""


def _read_first(source: Source, text_column: str, encoder: DocumentEncoder | None) -> None:
    """Raises DataError if no document can be read."""
    documents = next((batch.texts for batch in read_documents(source, text_column) if batch.texts), None)
    if documents is None:
        raise DataError(f"no text in {source}; expected at least one line that is not blank")
    if encoder is not None:
        for _ in encoder.encode(documents[:FIRST_DOCUMENTS]):
            pass
