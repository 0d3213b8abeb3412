"""Generated text: token blocks in a folder of the run, with what they were made by, and the parts of a tokenizer that
generation needs.

The folder has `tokens.bin`, `starts.bin` and `sizes.bin` as `token_file.py` describes them, `generated.json` with
settings and checksums, and `examples.txt` for readers.

Shape legend: N sequences, S tokens per sequence, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from das_ds.data.token_blocks import TokenBlocks
from das_ds.data.token_file import STARTS_DTYPE, TokenCorpus, TokenFile
from das_ds.data.tokenize import build_backend
from das_ds.errors import RunFolderError
from das_ds.functional.token_ids import num_tokens
from das_ds.storage import VersionedJson, atomic_dir, checksum

RECORD_FILE = "generated.json"
EXAMPLES_FILE = "examples.txt"
NUM_EXAMPLES = 8
TOKENS_FILE = "tokens.bin"


class GeneratedRecord(VersionedJson):
    """What generated text is, and what it was made by."""

    what: ClassVar[str] = "the record of generated text"

    format_version: Literal[1] = 1
    dtype: str
    num_sequences: int
    sequence_length: int
    num_documents: int
    checksums: dict[str, str]
    """File of the folder -> SHA-256."""
    settings: dict[str, Any]
    """Seed, domain and how it was sampled."""

    @property
    def fingerprint(self) -> str:
        """Of the tokens."""
        return self.checksums[TOKENS_FILE]


def write_generated(
    folder: Path, tokens: Tensor, starts: Tensor, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]
) -> None:
    """Write generated text, replacing the folder; on one rank.

    Args:
        folder: to write.
        tokens: (N, S) int64.
        starts: (N, S) bool, tokens that begin a document; every sequence does.
        tokenizer: whose ids they are.
        settings: for the record.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    dtype = np.dtype("<u2" if num_tokens(tokenizer.get_vocab()) <= 2**16 else "<u4")
    flat = tokens.flatten()
    indices = starts.flatten().nonzero().squeeze(1)
    documents = flat.tensor_split(indices[1:].cpu())
    texts = tokenizer.batch_decode([document.tolist() for document in documents], skip_special_tokens=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_dir(folder) as partial:
            file = TokenFile(partial / TOKENS_FILE, dtype.str, flat.numel(), len(documents))
            flat.numpy().astype(dtype).tofile(file.path)
            indices.numpy().astype(STARTS_DTYPE).tofile(file.starts_path)
            np.array([len(text.encode()) for text in texts], dtype=STARTS_DTYPE).tofile(file.sizes_path)
            examples = tokenizer.batch_decode(tokens[:NUM_EXAMPLES].tolist())
            (partial / EXAMPLES_FILE).write_text("\n\n".join(examples) + "\n", encoding="utf-8")
            GeneratedRecord(
                dtype=dtype.str,
                num_sequences=len(tokens),
                sequence_length=tokens.shape[1],
                num_documents=len(documents),
                checksums={path.name: checksum(path) for path in (file.path, file.starts_path, file.sizes_path)},
                settings=settings,
            ).write(partial / RECORD_FILE)
    except OSError as error:
        raise RunFolderError(
            f"{folder}: generated text cannot be written ({error.strerror or error}); its folder must be writable and "
            "have free space"
        ) from error


def read_generated(folder: Path, *, document_mask: bool) -> tuple[TokenBlocks, GeneratedRecord]:
    """The blocks of generated text, and its record.

    Raises:
        RunFolderError: files are missing or altered.
    """
    record = GeneratedRecord.read(folder / RECORD_FILE)
    for name, expected in record.checksums.items():
        path = folder / name
        if not path.is_file() or checksum(path) != expected:
            raise RunFolderError(
                f"{path}: found a file that is missing or altered, expected generated text as it was written; restore "
                "it, or resume from a checkpoint before it was generated"
            )
    length = record.sequence_length
    file = TokenFile(folder / TOKENS_FILE, record.dtype, record.num_sequences * length, record.num_documents)
    corpus = TokenCorpus(folder.name, (file,))
    return TokenBlocks(corpus, length, document_mask=document_mask), record


def document_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Special tokens that the tokenizer puts before a document."""
    encoding = build_backend(tokenizer).encode("a")
    is_text = np.flatnonzero(np.array(encoding.special_tokens_mask) == 0)
    return list(encoding.ids[: is_text[0]]) if len(is_text) else []


def ordinary_tokens(tokenizer: PreTrainedTokenizerBase, also: set[int]) -> Tensor:
    """Which ids are tokens of text, and neither special tokens, but those of `also`, nor ids without a token.

    Returns:
        (V,) bool.
    """
    ids = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids) | also
    allowed = torch.zeros(num_tokens(tokenizer.get_vocab()), dtype=torch.bool)
    allowed[list(ids)] = True
    return allowed
