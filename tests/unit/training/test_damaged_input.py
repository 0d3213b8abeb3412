"""Damaged files, and the errors libraries raise on them: always one line, in preflight and in training."""

from __future__ import annotations

import gzip
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from das_ds.config import RunConfig
from das_ds.distributed.process_group import RankInfo
from das_ds.errors import DasError
from das_ds.models.loading import find_spec, load_model
from das_ds.preflight.corpora import check_corpora
from das_ds.preflight.memory import check_model
from das_ds.softmask.importance_file import stored_importance
from das_ds.training.data_module import prepare_data
from das_ds.user_files import LFS_HEADER
from helpers.preflight import Alone, silent_checks
from helpers.runs import small_run

POINTER = LFS_HEADER + b"\noid sha256:4d7a\nsize 12345\n"
CPU = RankInfo(0, 0, 1, torch.device("cpu"))


def saved_model(folder: Path) -> Path:
    """A complete model folder with its tokenizer."""
    values = small_run(folder)
    model, _ = load_model(RunConfig(**values).model, seed=0, vocab_size=300)
    path = folder / "model"
    model.save_pretrained(path)
    for file in (folder / "tokenizer").iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def said(values: dict[str, Any]) -> tuple[list[str], str]:
    """What preflight finds failed, and what training stops with before its first step."""
    config = RunConfig(**values)
    checks = silent_checks(Alone())
    check_model(checks, config)
    check_corpora(checks, config)
    failed = [finding.found for finding in checks.results if finding.status == "failed"]
    with pytest.raises(DasError) as caught:
        text = prepare_data(config, CPU, find_spec(config.model).objective)
        load_model(config.model, seed=0, vocab_size=len(text.base_tokenizer))
    return failed, str(caught.value)


def check_one_line(values: dict[str, Any], expected: str, *, in_preflight: bool = True) -> None:
    failed, message = said(values)
    assert expected in message and "\n" not in message
    if in_preflight:
        assert any(expected in found for found in failed), failed
    assert all("\n" not in found for found in failed)


def run_over(folder: Path, model: Path) -> dict[str, Any]:
    """A run that starts from a model folder and its tokenizer."""
    values = small_run(folder, model={"config": None, "name_or_path": str(model)})
    values["data"]["tokenizer"] = None
    return values


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("tokenizer.json", b'{"version": "1.0", "model": {"type": "Unheard"}}', "cannot load the tokenizer"),
        ("tokenizer.json", b"[1, 2]", "cannot load the tokenizer"),
        ("tokenizer.json", b"[" * 100_000, "cannot load the tokenizer"),
        ("tokenizer.json", b"\xff\xfe\x00", "cannot load the tokenizer"),
        ("tokenizer.json", POINTER, "found Git LFS pointers in place of tokenizer.json"),
        ("tokenizer_config.json", b"[]", "cannot load the tokenizer"),
        ("tokenizer_config.json", POINTER, "found Git LFS pointers in place of tokenizer_config.json"),
        ("config.json", b"{", "cannot load the model config"),
        ("config.json", b"[" * 100_000, "cannot load the model config"),
        ("config.json", b'{"model_type": ["roberta"]}', "cannot load the model config"),
        ("config.json", POINTER, "found Git LFS pointers in place of config.json"),
    ],
)
def test_corrupt_model_folder_is_one_line(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    model = saved_model(tmp_path)
    (model / name).write_bytes(content)
    check_one_line(run_over(tmp_path, model), expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (POINTER, "found Git LFS pointers in place of model.safetensors"),
        (b"\xff" * 64, "cannot load the model"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00" + b'{"a": {"dtype"', "cannot load the model"),
        (b"", "cannot load the model"),
    ],
)
def test_corrupt_weights_are_one_line(tmp_path: Path, content: bytes, expected: str) -> None:
    model = saved_model(tmp_path)
    (model / "model.safetensors").write_bytes(content)
    # Preflight reads no weights.
    check_one_line(run_over(tmp_path, model), expected, in_preflight=False)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_attention_heads": 0}, "cannot "),
        ({"hidden_size": 10**20}, "cannot "),
        ({"hidden_size": "wide"}, "cannot "),
        ({"num_hidden_layers": -1.5}, "model.config.num_hidden_layers: found -1.5, allowed: at least 1"),
    ],
)
def test_invalid_model_config_is_one_line(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    values = small_run(tmp_path)
    values["model"]["config"] |= changes
    check_one_line(values, expected, in_preflight=False)


def as_fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("name", "make", "expected"),
    [
        ("pipe.txt", as_fifo, "pipe.txt: found a pipe, socket or device; expected a regular file"),
        ("a.txt", lambda path: path.write_bytes(POINTER), "a.txt: cannot be read (is a Git LFS pointer"),
        ("a.parquet", lambda path: path.write_bytes(POINTER), "a.parquet: cannot be read (is a Git LFS pointer"),
        ("a.parquet", lambda path: path.write_bytes(b"PAR1" + b"\0" * 64 + b"PAR1"), "a.parquet: damaged parquet file"),
        ("a.parquet", lambda path: path.write_bytes(b""), "a.parquet: damaged parquet file"),
        ("a.txt.gz", lambda path: path.write_bytes(gzip.compress(b"word " * 999)[:-9]), "a.txt.gz: damaged archive"),
        ("a.txt.xz", lambda path: path.write_bytes(lzma.compress(b"word " * 999)[:-9]), "a.txt.xz: damaged archive"),
        ("a.jsonl", lambda path: path.write_bytes(b"[" * 100_000), "a.jsonl, line 1: not JSON"),
        ("a.txt", lambda path: path.write_bytes(b"one\r\ntwo\xff\r\n"), "a.txt, line 2: found byte 0xff"),
        ("a" * 250 + ".txt", lambda path: path.write_text("x"), "found 3 tokens"),
        ("short.txt", lambda path: path.write_text("noodle soup\n"), "short.txt"),
    ],
)
def test_unusable_text_is_one_line(tmp_path: Path, name: str, make: Callable[[Path], Any], expected: str) -> None:
    make(tmp_path / name)
    values = small_run(tmp_path)
    values["domains"][1]["train"] = [str(tmp_path / name)]
    failed, message = said(values)
    assert "corpus 'papers" in message and "\n" not in message
    assert failed and "corpus 'papers'" in failed[0] and expected in failed[0]


def test_too_long_file_name_is_one_line(tmp_path: Path) -> None:
    values = small_run(tmp_path)
    values["domains"][1]["train"] = ["x" * 5000 + ".txt"]
    check_one_line(values, "cannot be read (File name too long)")


def test_too_short_corpus_fails_before_training(tmp_path: Path) -> None:
    values = small_run(tmp_path)
    path = tmp_path / "short.txt"
    path.write_text("noodle soup\n", encoding="utf-8")
    values["domains"][1] |= {"train": [str(path)], "valid": []}
    failed, _ = said(values)
    assert "expected at least 32, 2 x data.sequence_length 16, one to train on and one to hold out" in failed[0]
    values["domains"][1] |= {"train": values["domains"][0]["train"], "valid": [str(path)]}
    failed, _ = said(values)
    assert "expected at least 16, 1 x data.sequence_length 16" in failed[0]


def test_held_out_text_in_training_text_raises(tmp_path: Path) -> None:
    values = small_run(tmp_path)
    (tmp_path / "link.txt").symlink_to(values["domains"][1]["train"][0])
    for valid in (values["domains"][1]["train"], [str(tmp_path / "link.txt")], [f"{tmp_path}/p*.txt"]):
        values["domains"][1]["valid"] = valid
        check_one_line(values, "in train and in valid; expected separate held-out text")


def test_held_out_text_of_another_corpus_warns(tmp_path: Path) -> None:
    values = small_run(tmp_path)
    values["general"]["valid"] = values["domains"][0]["train"]
    checks = silent_checks(Alone())
    check_corpora(checks, RunConfig(**values))
    (finding,) = checks.results
    assert finding.status == "warning"
    assert "food.txt is held out for general, but domain food trains on it" in finding.found


def test_importance_as_lfs_pointer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "importance.safetensors"
    path.write_bytes(POINTER)
    with pytest.raises(DasError, match="cannot read importance: is a Git LFS pointer"), stored_importance(path):
        pass


def test_unread_lfs_pointer_passes(tmp_path: Path) -> None:
    model = saved_model(tmp_path)
    for name in ("pytorch_model.bin", "tf_model.h5", "vocab.txt"):
        (model / name).write_bytes(POINTER)
    config = RunConfig(**run_over(tmp_path, model))
    text = prepare_data(config, CPU, "mlm")
    load_model(config.model, seed=0, vocab_size=len(text.base_tokenizer))
