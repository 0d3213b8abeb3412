"""The base decoder: a small LLaMA with random weights and a tokeniser of the general corpus, pre-trained on it."""

from __future__ import annotations

import lzma
from pathlib import Path

from benchmarks.domains.data import GENERAL, corpus
from das_ds.storage import atomic_dir
from launch.demo_corpora import train_tokenizer

VOCAB_SIZE = 16_384


def decoder_tokenizer(folder: Path, data: Path) -> Path:
    """Folder of the tokeniser under `folder`; trained where it is not there."""
    tokenizer = folder / "decoder_tokenizer"
    if not tokenizer.exists():
        text = lzma.decompress(Path(corpus(data, GENERAL)["train"][0]).read_bytes()).decode()
        with atomic_dir(tokenizer) as partial:
            train_tokenizer(text.splitlines(), VOCAB_SIZE).save_pretrained(partial)
    return tokenizer
