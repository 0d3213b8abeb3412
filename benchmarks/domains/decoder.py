"""The base decoder's tokenizer; the model is a small LLaMA pre-trained on the general corpus from random weights."""

from __future__ import annotations

import lzma
from pathlib import Path

from benchmarks.domains.data import GENERAL, corpus
from das_ds.storage import atomic_dir
from launch.demo_corpora import train_tokenizer


def decoder_tokenizer(folder: Path, data: Path, vocab_size: int) -> Path:
    """Folder of the tokenizer, which is trained unless it exists."""
    tokenizer = folder / f"decoder_tokenizer_{vocab_size}"
    if not tokenizer.exists():
        text = lzma.decompress(Path(corpus(data, GENERAL)["train"][0]).read_bytes()).decode()
        with atomic_dir(tokenizer) as partial:
            train_tokenizer(text.splitlines(), vocab_size).save_pretrained(partial)
    return tokenizer
