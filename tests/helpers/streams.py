"""Streams of text over small shards, and what their tokens have to be, computed by other means."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from das_ds.data.stream_windows import TokenStream, open_stream
from helpers.configs import changed
from helpers.runs import WORDS, small_run
from helpers.tiny_tokenizer import tiny_tokenizer

DOCUMENTS = [" ".join(WORDS[start : start + 3 + start % 7]) for start in range(40)]
SEED = 5


def write_shards(folder: Path, num_shards: int = 4) -> list[list[str]]:
    """Text files, parquet and JSON lines, with blank documents between others; the documents of each, in name order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(exist_ok=True)
    shards = [DOCUMENTS[number::num_shards] for number in range(num_shards)]
    for number, documents in enumerate(shards):
        if number % 3 == 0:
            (folder / f"{number}.txt").write_text("\n\n".join(documents) + "\n")
        elif number % 3 == 1:
            pq.write_table(pa.table({"text": [*documents, "  "]}), folder / f"{number}.parquet", row_group_size=3)
        else:
            lines = (json.dumps({"text": text}) for text in ["", *documents])
            (folder / f"{number}.jsonl").write_text("\n".join(lines))
    return shards


def open_shards(folder: Path, cache: Path, window_tokens: int, **changes: Any) -> TokenStream:
    """The stream of `write_shards`."""
    settings: dict[str, Any] = {
        "corpus": "soup-train",
        "text_column": "text",
        "tokenizer": tiny_tokenizer(),
        "cache_dir": cache,
        "end_of_text": None,
        "seed": SEED,
        "window_tokens": window_tokens,
    }
    return open_stream([str(folder / "*")], **{**settings, **changes})


def drawn_order(num_items: int, seed: int, name: str, index: int) -> list[int]:
    """The permutation that Philox draws with key (seed, BLAKE2b of the name) and the index as its highest word."""
    key = int.from_bytes(hashlib.blake2b(f"{name}/order".encode(), digest_size=8).digest(), "little")
    philox = np.random.Philox(
        key=np.array([seed, key], dtype=np.uint64), counter=np.array([0, 0, 0, index], dtype=np.uint64)
    )
    return list(np.random.Generator(philox).permutation(num_items).tolist())


def stream_tokens(shards: Sequence[Sequence[str]], seed: int, corpus: str, num_tokens: int) -> list[int]:
    """The first tokens of the stream: all documents of all shards, in the order of epoch 0, then 1, and so on."""
    tokens: list[int] = []
    for document in _documents(shards, seed, corpus):
        if len(tokens) >= num_tokens:
            break
        tokens += tiny_tokenizer()(document)["input_ids"]
    return tokens[:num_tokens]


def _documents(shards: Sequence[Sequence[str]], seed: int, corpus: str) -> Iterator[str]:
    epoch = 0
    while True:
        for shard in drawn_order(len(shards), seed, f"shards/{corpus}", epoch):
            yield from shards[shard]
        epoch += 1


def streamed_run(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """A run that streams food, and papers as one of two sources, and replays food; windows of two steps."""
    values = small_run(folder)
    papers = values["domains"][1]
    for corpus in ("food", "papers"):
        shards = folder / f"{corpus}-shards"
        if not shards.exists():
            write_shards(shards, 5)
            (shards / "9.txt").write_text(f"the {corpus} of twelve weeks\n" * 3)
        (folder / f"{corpus}-valid.txt").write_text(f"the {corpus} was held out\n" * 20)
    sources = [
        {"name": "stream", "train": [str(folder / "papers-shards" / "*")], "weight": 0.75, "streaming": True},
        {"name": "file", "train": papers["train"], "weight": 0.25},
    ]
    values = {
        **values,
        "output_dir": folder / name,
        "domains": [
            {
                "name": "food",
                "train": [str(folder / "food-shards" / "*")],
                "valid": [str(folder / "food-valid.txt")],
                "streaming": True,
            },
            {
                "name": "papers",
                "sources": sources,
                "valid": [str(folder / "papers-valid.txt")],
                "replay": {"fraction": 0.25},
            },
        ],
        "data": {**values["data"], "shuffle_buffer": 16},
        "train": {**values["train"], "micro_batch_size": 2, "steps_per_domain": 7},
    }
    return changed(values, changes)


def window_tokens(stream: TokenStream, window: int) -> list[int]:
    """All tokens of a window."""
    return list(stream.require(window).tokens.tolist())
