"""Tokens per second from a text file to blocks: das_ds against the usual `datasets.map` pipeline.

The usual pipeline is that of the `run_mlm.py` example of transformers: load the lines, map the tokenizer over them,
then map a function that joins the lists and cuts them into blocks. Both start from the file with empty caches and a
separate tokenizer, take turns, and the best time counts.

Run: `python -m benchmarks.tokenize [text file]`; without a file, on the sources of Python's standard library.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.result_io import print_table, write_result
from das_ds.data.token_blocks import TokenBlocks
from das_ds.data.tokenize import prepare_tokens

SEQUENCE_LENGTH = 128
TEXT_BYTES = 8_000_000
VOCAB_SIZE = 8000
TRAINING_LINES = 30_000
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def write_library_sources(path: Path, num_bytes: int = TEXT_BYTES) -> None:
    """Writes about `num_bytes` of the standard library's sources to a file."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*/*.py"))
    with path.open("wb") as file:
        for source in sources:
            if file.tell() >= num_bytes:
                break
            text = source.read_text(encoding="utf-8", errors="ignore")
            file.write(text.encode())


def train_tokenizer(path: Path) -> str:
    """Byte-level BPE with RoBERTa's special tokens, trained on the first lines of the file; as JSON."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    with path.open(encoding="utf-8") as lines:
        tokenizer.train_from_iterator(islice(lines, TRAINING_LINES), trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return tokenizer.to_str()


def run_das_ds(path: Path, tokenizer: PreTrainedTokenizerFast, cache_dir: Path) -> int:
    """Number of tokens in the blocks that das_ds makes."""
    tokens = prepare_tokens(
        [str(path)], corpus="text", text_column="text", tokenizer=tokenizer, cache_dir=cache_dir, progress=False
    )
    return len(TokenBlocks(tokens, SEQUENCE_LENGTH)) * SEQUENCE_LENGTH


def run_datasets_map(path: Path, tokenizer: PreTrainedTokenizerFast, cache_dir: Path) -> int:
    """Number of tokens in the blocks that the usual pipeline makes."""

    def tokenize(examples: dict[str, Any]) -> Any:
        return tokenizer(examples["text"], return_special_tokens_mask=True)

    def group_texts(examples: dict[str, Any]) -> dict[str, Any]:
        joined = {key: list(chain(*examples[key])) for key in examples}
        length = len(joined["input_ids"]) // SEQUENCE_LENGTH * SEQUENCE_LENGTH
        starts = range(0, length, SEQUENCE_LENGTH)
        return {key: [values[start : start + SEQUENCE_LENGTH] for start in starts] for key, values in joined.items()}

    lines = datasets.load_dataset("text", data_files=str(path), split="train", cache_dir=str(cache_dir))
    blocks = lines.map(tokenize, batched=True, remove_columns=["text"]).map(group_texts, batched=True)
    return len(blocks) * SEQUENCE_LENGTH


def measure(pipeline: Callable[..., int], path: Path, tokenizer_json: str) -> dict[str, float]:
    """Wall seconds, CPU seconds and number of tokens of one run with empty caches."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer_json), mask_token="<mask>")
    with TemporaryDirectory() as cache_dir:
        wall_start = time.perf_counter()
        cpu_start = time.process_time()
        num_tokens = pipeline(path, tokenizer, Path(cache_dir))
        return {
            "seconds": time.perf_counter() - wall_start,
            "cpu_seconds": time.process_time() - cpu_start,
            "tokens": num_tokens,
        }


def compare(path: Path, repeats: int) -> list[dict[str, Any]]:
    """One row per pipeline: its fastest run, its tokens per second, and their ratio to the usual pipeline."""
    tokenizer_json = train_tokenizer(path)
    pipelines = {"datasets.map + group_texts": run_datasets_map, "das_ds": run_das_ds}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in pipelines}
    for _ in range(repeats):
        for name, pipeline in pipelines.items():
            runs[name].append(measure(pipeline, path, tokenizer_json))
    fastest = {name: min(repeated, key=lambda run: run["seconds"]) for name, repeated in runs.items()}
    rates = {name: run["tokens"] / run["seconds"] for name, run in fastest.items()}
    usual_rate = next(iter(rates.values()))
    return [
        {"pipeline": name, **run, "tokens_per_s": round(rates[name]), "ratio": rates[name] / usual_rate}
        for name, run in fastest.items()
    ]


def main() -> None:
    """Measure, print and store the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("text", nargs="?", type=Path, help="text file, one document per line")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    with TemporaryDirectory() as folder:
        path = arguments.text or Path(folder) / "library.txt"
        if arguments.text is None:
            write_library_sources(path)
        rows = compare(path, arguments.repeats)
        settings = {"bytes": path.stat().st_size, "sequence_length": SEQUENCE_LENGTH, "vocab_size": VOCAB_SIZE}
    print_table(rows)
    print(f"das_ds: {rows[1]['ratio']:.1f} x the tokens per second of datasets.map")
    write_result("tokenize", torch.device("cpu"), settings, rows)


if __name__ == "__main__":
    main()
