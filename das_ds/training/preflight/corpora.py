"""Whether the text is there: every source of every corpus is opened and its first document read."""

from __future__ import annotations

from pathlib import Path

from das_ds.config import CorpusConfig, RunConfig
from das_ds.data.corpus import read_documents
from das_ds.data.sources import Source, resolve_source
from das_ds.errors import DataError, PreflightError
from das_ds.training.preflight.report import Checks, readable
from das_ds.training.text import evaluated


def check_corpora(checks: Checks, config: RunConfig) -> None:
    """Every rank reads: each of them opens all text later."""
    corpora = evaluated(config)

    def judge(found: list[list[Source]]) -> str:
        if any([str(source) for source in other] != [str(source) for source in found[0]] for other in found):
            raise PreflightError("globs and names stand for different files on different ranks")
        num_bytes = sum(source.stat().st_size for source in found[0] if isinstance(source, Path))
        return f"{len(corpora)} corpora, {len(found[0])} sources, {readable(num_bytes)} of files"

    checks.run(
        "corpora",
        "text in every source",
        lambda: [source for corpus in corpora for source in _opened(corpus)],
        judge,
    )


def _opened(corpus: CorpusConfig) -> list[Source]:
    try:
        sources = [source for name in (*corpus.train, *corpus.valid) for source in resolve_source(name)]
        for source in sources:
            _read_first(source, corpus.text_column)
    except DataError as error:
        raise DataError(f"corpus '{corpus.name}': {error}") from error
    return sources


def _read_first(source: Source, text_column: str) -> None:
    """Raises DataError where no document can be read."""
    if not any(batch.texts for batch in read_documents(source, text_column)):
        raise DataError(f"no text in {source}; expected at least one line that is not blank")
