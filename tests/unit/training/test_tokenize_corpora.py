"""`das-ds tokenize`: the token files that training reads, from processes that may be killed or run at the same time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from das_ds.cli import main
from das_ds.config.io import load_config
from das_ds.data import parts, tokenize
from das_ds.distributed.process_group import RankInfo
from das_ds.training import tokenize_corpora
from das_ds.training.data_module import prepare_data
from helpers.commands import QUICK_START, ROOT, write_config
from helpers.runs import small_run
from helpers.streams import streamed_run

CPU = RankInfo(0, 0, 1, torch.device("cpu"))
# Parts are small, so that there are many of them, and each is written slowly enough to be interrupted.
PROGRAM = """
import sys, time
from das_ds.data import part_writer, parts
from das_ds.cli import main

parts.PART_BYTES = 500
write = part_writer.write_part

def slowly(*arguments):
    time.sleep(float(sys.argv[1]))
    return write(*arguments)

part_writer.write_part = slowly
if __name__ == "__main__":
    sys.exit(main(["tokenize", "--config", sys.argv[2], "--processes", sys.argv[3]]))
"""


def config_file(folder: Path) -> Path:
    return write_config(folder, small_run(folder, data={"add_tokens": {"papers": ["simmering"]}}))


def start(folder: Path, config: Path, pause: float, num_processes: int = 1) -> subprocess.Popen[str]:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    words = [sys.executable, program, str(pause), config, str(num_processes)]
    return subprocess.Popen(
        words,
        env=os.environ | QUICK_START | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_tokenize_makes_what_training_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config_file(tmp_path)
    assert main(["tokenize", "--config", str(path), "--processes", "1"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["corpus", "documents", "tokens", "blocks", "tokens/s"]
    assert [row.split()[0] for row in table[2:]] == ["food-train", "papers-train", "general-valid"]
    monkeypatch.delattr(tokenize, "write_parts")
    data = prepare_data(load_config(path, []), CPU, "mlm")
    corpora = [data.blocks["food"].train, data.blocks["papers"].train, data.blocks["general"].valid]
    for row, blocks in zip(table[2:], corpora, strict=True):
        assert blocks is not None
        (part,) = blocks.parts
        counts = (part.tokens.num_documents, part.tokens.num_tokens, part.tokens.num_tokens // 16)
        assert row.split()[1:4] == [f"{count:,}" for count in counts]
    # Again nothing is tokenized.
    assert main(["tokenize", "--config", str(path)]) == 0
    assert capsys.readouterr().out.count("in the cache") == 3


def test_tokenize_leaves_streamed_text_to_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, streamed_run(tmp_path, "run"))
    assert main(["tokenize", "--config", str(path), "--processes", "1"]) == 0
    rows = {row.split()[0]: row.split()[1:] for row in capsys.readouterr().out.splitlines()[2:]}
    assert rows["food-train"] == rows["papers-stream-train"] == ["streamed"]
    assert [name for name, cells in rows.items() if len(cells) == 4] == [
        "food-valid",
        "papers-file-train",
        "papers-valid",
        "general-valid",
    ]
    assert not (tmp_path / "cache" / "streams").exists()


def test_tokenize_killed_continues_and_two_at_once_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = config_file(tmp_path)
    made = tmp_path / "cache" / "parts"
    first = start(tmp_path, path, 0.3, num_processes=2)
    deadline = time.monotonic() + 120
    while not list(made.glob("[!.]*")) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait(60)
    before = {folder.name: folder.stat().st_mtime_ns for folder in made.glob("[!.]*")}
    assert before and not list((tmp_path / "cache").glob("general-*.json")), "killed in the middle"
    both = [start(tmp_path, path, 0.01) for _ in range(2)]
    for process in both:
        output, error = process.communicate(timeout=240)
        assert process.returncode == 0, error
        assert "general-valid" in output
    assert {name: (made / name).stat().st_mtime_ns for name in before} == before
    assert not list(made.glob(".partial-*"))
    monkeypatch.setattr(parts, "PART_BYTES", 500)
    monkeypatch.delattr(tokenize, "write_parts")
    found = prepare_data(load_config(path, []), CPU, "mlm").blocks
    monkeypatch.undo()
    other = load_config(path, [f"data.cache_dir={tmp_path / 'other'}"])
    for name, expected in prepare_data(other, CPU, "mlm").blocks.items():
        indices = range(len(expected.valid))
        assert torch.equal(found[name].valid.index_select(indices), expected.valid.index_select(indices))


def test_tokenize_interrupted_is_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenize_corpora, "prepare_data", interrupt)
    assert main(["tokenize", "--config", str(config_file(tmp_path))]) == 75
    assert capsys.readouterr().err == (
        "das_ds: stopped; finished parts are in the cache, and the same command continues\n"
    )


def test_tokenize_without_processes_is_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenize", "--config", str(config_file(tmp_path)), "--processes", "0"]) == 2
    assert capsys.readouterr().err == "das_ds: --processes: found 0, expected at least 1\n"
