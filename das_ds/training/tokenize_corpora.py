"""Tokenizing before a run: all of its corpora, as training and preflight will look for them, without ranks or a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from das_ds.config import RunConfig
from das_ds.data.blocks import Blocks
from das_ds.data.stream_blocks import StreamBlocks
from das_ds.distributed.process_group import RankInfo
from das_ds.errors import ConfigError, StoppedError
from das_ds.models.loading import find_spec
from das_ds.reporting.tables import Row
from das_ds.training.data_module import DataModule, prepare_data
from das_ds.training.revisions import with_recorded_revisions

HEADER = ("corpus", "documents", "tokens", "blocks", "tokens/s")


def tokenize_corpora(config: RunConfig, num_processes: int) -> list[Row]:
    """Tokenize every corpus of a run, with the tokens that domains add, or find it in the cache.

    Text that is streamed is left to training.

    Args:
        config: of the run.
        num_processes: processes that tokenize.

    Returns:
        A table: the corpora by split (and source), with what was tokenized per second in this start.

    Raises:
        DasError: a tokenizer or corpus that cannot be used.
        StoppedError: interrupted; what is done is kept.
    """
    if num_processes < 1:
        raise ConfigError(f"--processes: found {num_processes}, expected at least 1")
    config = with_recorded_revisions(config)
    info = RankInfo(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    try:
        data = prepare_data(config, info, find_spec(config.model).objective, num_processes=num_processes)
    except KeyboardInterrupt:
        raise StoppedError("stopped; finished parts are in the cache, and the same command continues") from None
    return [HEADER, *_rows(data)]


def _rows(data: DataModule) -> Iterator[Row]:
    for corpus, both in data.blocks.items():
        splits: list[tuple[str, Blocks | None]] = [("train", both.train), ("valid", both.valid)]
        seen = set[str]()
        for split, blocks in splits:
            # Without text of its own, the held-out split is the end of the training text.
            parts = [] if blocks is None else [part for part in blocks.parts if part.name not in seen]
            for part in parts:
                if isinstance(part, StreamBlocks):
                    yield part.name.rpartition("-")[0], "", "", "", "streamed"
                    continue
                tokens = part.tokens
                seen.add(tokens.name)
                name = tokens.name.rpartition("-")[0] if len(parts) > 1 else f"{corpus}-{split}"
                rate = f"{tokens.num_new_tokens / tokens.seconds:,.0f}" if tokens.num_new_tokens else "in the cache"
                num_blocks = tokens.num_tokens // part.sequence_length
                yield name, f"{tokens.num_documents:,}", f"{tokens.num_tokens:,}", f"{num_blocks:,}", rate
