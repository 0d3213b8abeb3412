"""Generated text in its folder: blocks, documents and record; and what a tokenizer tells of documents."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from tokenizers import processors

from das_ds.data.generated import document_prefix, ordinary_tokens, read_generated, write_generated
from das_ds.errors import RunFolderError
from das_ds.functional.token_sampling import document_starts
from helpers.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def written(folder: Path) -> torch.Tensor:
    ids = TOKENIZER("The noodles were cold, but the price was fair.")["input_ids"]
    tokens = torch.tensor((ids * 4)[:50]).view(5, 10)
    starts = document_starts(tokens, TOKENIZER.eos_token_id, begins_with_end=False)
    write_generated(folder, tokens, starts, TOKENIZER, {"seed": 3})
    return tokens


def test_read_generated_gives_what_was_written(tmp_path: Path) -> None:
    tokens = written(tmp_path / "domains" / "generated")
    blocks, record = read_generated(tmp_path / "domains" / "generated", document_mask=True)
    assert torch.equal(blocks.index_select(range(5)), tokens)
    positions = blocks.positions(range(5))
    assert positions is not None
    # Positions restart at every document, and at every row.
    assert positions[:, 0].tolist() == [0] * 5
    after_end = (tokens[:, :-1] == TOKENIZER.eos_token_id).nonzero()
    assert len(after_end) and all(positions[row, column + 1] == 0 for row, column in after_end.tolist())
    assert (positions == 0).sum() == 5 + len(after_end) == record.num_documents
    assert record.settings == {"seed": 3} and record.num_sequences == 5 and record.sequence_length == 10
    decoded = TOKENIZER.decode(tokens.flatten().tolist(), skip_special_tokens=True)
    assert blocks.count_documents() == (50, len(decoded.encode()))
    examples = (tmp_path / "domains" / "generated" / "examples.txt").read_text()
    assert examples.startswith("<s>The noodles")


def test_write_generated_replaces_folder(tmp_path: Path) -> None:
    written(tmp_path / "generated")
    first = read_generated(tmp_path / "generated", document_mask=False)[1]
    tokens = torch.full((2, 8), 7)
    write_generated(tmp_path / "generated", tokens, torch.ones_like(tokens, dtype=torch.bool), TOKENIZER, {})
    blocks, record = read_generated(tmp_path / "generated", document_mask=False)
    assert torch.equal(blocks.index_select([0, 1]), tokens) and record.fingerprint != first.fingerprint


@pytest.mark.parametrize("name", ["tokens.bin", "starts.bin"])
@pytest.mark.parametrize("how", ["missing", "altered"])
def test_read_generated_damaged_file_is_named(name: str, how: str, tmp_path: Path) -> None:
    written(tmp_path / "generated")
    path = tmp_path / "generated" / name
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(b"\x05" + path.read_bytes()[1:])
    with pytest.raises(RunFolderError, match=rf"{name}: found a file that is missing or altered, expected .*; restore"):
        read_generated(tmp_path / "generated", document_mask=False)


def test_write_generated_full_disk_is_error(tmp_path: Path) -> None:
    with (
        patch("das_ds.data.generated.checksum", side_effect=OSError(28, "No space left on device")),
        pytest.raises(RunFolderError, match=r"generated text cannot be written \(No space left on device\)"),
    ):
        written(tmp_path / "generated")
    assert list(tmp_path.iterdir()) == []


def test_document_prefix_is_what_comes_before_text() -> None:
    assert document_prefix(TOKENIZER) == [TOKENIZER.bos_token_id]
    plain = tiny_tokenizer()
    plain.backend_tokenizer.post_processor = processors.ByteLevel()
    assert document_prefix(plain) == []


def test_ordinary_tokens_are_neither_special_nor_holes() -> None:
    allowed = ordinary_tokens(TOKENIZER, {TOKENIZER.eos_token_id})
    assert len(allowed) == 300
    assert (~allowed).nonzero().squeeze(1).tolist() == sorted(set(TOKENIZER.all_special_ids) - {TOKENIZER.eos_token_id})
