"""The demo's corpora and tokenizer: `<name>/train.jsonl` and `<name>/valid.jsonl` per corpus, and `tokenizer/`.

The text is the same on every machine with the same packages: documents are deduplicated, sorted by their digests (which
mixes the sources and removes the order in which files were found) and truncated at a size.

    python -m launch.demo_corpora FOLDER
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from das_ds.errors import EXIT_USER_ERROR, DataError
from launch.demo_sources import cpp_documents, formula_documents, general_documents, python_documents

MIN_BYTES = 1_000_000
MIN_CHARACTERS = 80
MAX_CHARACTERS = 10_000
VALID_FRACTION = 0.05
VOCAB_SIZE = 512
TOKENIZER_FRACTION = 0.1
SPECIAL_TOKENS = {
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
TOKENIZER_FOLDER = "tokenizer"
MANIFEST = "manifest.json"
SOURCES = ("datasets", "networkx", "numpy", "sympy", "tokenizers", "torch")


@dataclass(frozen=True)
class DemoCorpus:
    """A corpus of the demo: the source of its documents and its maximum size."""

    name: str
    documents: Callable[[], Iterator[str]]
    max_bytes: int = 2_000_000


CORPORA = (
    DemoCorpus("general", general_documents, 3_000_000),
    DemoCorpus("python", python_documents),
    DemoCorpus("cpp", cpp_documents),
    DemoCorpus("formulas", formula_documents),
)
"""The corpus of the base model, then the domains in the order of learning."""


def build_corpora(folder: Path, corpora: Sequence[DemoCorpus] = CORPORA) -> bool:
    """Write corpora and tokenizer into `folder`, unless it already has them, complete and from the same packages.

    Returns:
        Whether anything was written.

    Raises:
        DataError: a corpus smaller than MIN_BYTES.
    """
    if _is_complete(folder):
        return False
    shutil.rmtree(folder, ignore_errors=True)
    selected = {corpus.name: select(corpus.documents(), corpus.max_bytes) for corpus in corpora}
    for name, documents in selected.items():
        _check_size(name, documents)
        _write_corpus(folder / name, documents)
    train_tokenizer(tokenizer_sample(selected)).save_pretrained(folder / TOKENIZER_FOLDER)
    manifest = {"versions": _versions(), "files": _file_sizes(folder)}
    # Written last: a folder with a matching manifest is complete.
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    return True


def select(documents: Iterable[str], max_bytes: int) -> list[str]:
    """Distinct documents of useful length in the order of their digests, together at most `max_bytes` of UTF-8."""
    distinct = {
        hashlib.sha256(encoded).digest(): encoded
        for document in documents
        if MIN_CHARACTERS <= len(text := document.strip()) <= MAX_CHARACTERS
        # A few strings in Python's own sources contain lone surrogates.
        for encoded in [text.encode("utf-8", "ignore")]
    }
    chosen: list[str] = []
    num_bytes = 0
    for _, encoded in sorted(distinct.items()):
        num_bytes += len(encoded)
        if num_bytes > max_bytes:
            break
        chosen.append(encoded.decode())
    return chosen


def tokenizer_sample(selected: dict[str, list[str]]) -> list[str]:
    """All text of the first corpus and a tenth of every other one.

    The tokenizers of real base models have seen some code too; trained on English alone, this one would split code into
    bytes and indentation into single spaces.
    """
    general, *domains = selected.values()
    return general + [text for documents in domains for text in documents[: round(len(documents) * TOKENIZER_FRACTION)]]


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Byte-level BPE with RoBERTa's special tokens and its `<s> document </s>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    begin, end = (SPECIAL_TOKENS[key] for key in ("bos_token", "eos_token"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} $B {end}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (begin, end)],
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)


def _check_size(name: str, documents: Sequence[str]) -> None:
    num_bytes = sum(len(document.encode()) for document in documents)
    if num_bytes < MIN_BYTES:
        raise DataError(
            f"demo corpus '{name}': found {num_bytes} bytes of text in the installed packages; expected at least "
            f"{MIN_BYTES} (install the project's pinned requirements)"
        )


def _write_corpus(folder: Path, documents: Sequence[str]) -> None:
    folder.mkdir(parents=True)
    num_valid = max(1, round(len(documents) * VALID_FRACTION))
    for part, texts in (("valid", documents[:num_valid]), ("train", documents[num_valid:])):
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        (folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")


def _is_complete(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(manifest == {"versions": _versions(), "files": _file_sizes(folder)})


def _file_sizes(folder: Path) -> dict[str, int]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _versions() -> dict[str, str]:
    return {package: metadata.version(package) for package in SOURCES}


def main(arguments: list[str] | None = None) -> int:
    """Write the corpora of the demo, for the tutorials; a failure is one line and an exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.demo_corpora", description="The demo's corpora.")
    parser.add_argument("folder", type=Path, help="where they are written, unless they are complete there")
    folder: Path = parser.parse_args(arguments).folder
    try:
        written = build_corpora(folder)
    except DataError as error:
        print(f"das_ds: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    names = ", ".join(corpus.name for corpus in CORPORA)
    print(f"{names} and {TOKENIZER_FOLDER}: {'written to' if written else 'up to date in'} {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
