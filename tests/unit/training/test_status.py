"""Status of a run from its files: in progress, stopped, finished, damaged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from das_ds.checkpoint.manifest import Manifest, RunState
from das_ds.cli import main
from das_ds.errors import CheckpointError, DasError, RunFolderError
from das_ds.training.status import read_status
from helpers.commands import ROOT
from helpers.locking import holding_process
from helpers.run_folders import write_run

STEPS = 5
"""Of a domain, in the config of `write_run`."""
TOKENS_PER_STEP = 8 * 12


def write_checkpoint(root: Path, name: str, **state: Any) -> Path:
    folder = root / "checkpoints" / name
    folder.mkdir(parents=True)
    Manifest(
        name=name,
        run=RunState(**state),
        world_size=1,
        zero_stage=0,
        metadata={},
        metrics_bytes=0,
        wandb_run_id=None,
        saved_at="2026-01-02T03:04:05+00:00",
        versions={},
        files={},
    ).write(folder)
    return folder


def write_metrics(root: Path, *steps: tuple[str, int, int], loss: Any = 2.5, end: str = "") -> None:
    """Lines for (domain, step in it, global step); `end` is a line that is being written."""
    rows = [
        {"domain": domain, "domain_step": step, "global_step": total, "loss": loss, "tokens_per_s": 96.0}
        for domain, step, total in steps
    ]
    lines = [json.dumps({**row, "tokens_seen": row["global_step"] * TOKENS_PER_STEP}) + "\n" for row in rows]
    (root / "metrics.jsonl").write_text("".join(lines) + end)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", num_rows=2, metrics=False)


def test_status_of_a_new_run_is_not_started(root: Path) -> None:
    (root / "results.json").unlink()
    status = read_status(root)
    assert (status.state, status.domain, status.phase, status.total_step) == ("not started", "acl", "evaluate", 0)
    assert status.total_steps == 2 * STEPS
    assert status.seconds_left is status.loss is status.stage is status.checkpoint is status.holder is None
    assert status.lines()[0] == f"{root}: not started"


def test_status_of_a_run_in_progress_counts_steps_after_the_checkpoint(root: Path) -> None:
    write_checkpoint(root, "000003_pubmed_train_1", phase="train", domains_done=1, domain_step=1, global_step=6)
    write_metrics(root, ("pubmed", 1, 6), ("pubmed", 3, 8), end='{"domain": "pub')
    (root / "STOP").touch()
    with holding_process(root) as pid:
        status = read_status(root)
    assert status.state == "running" and status.holder is not None and status.holder.startswith(f"pid {pid} on ")
    assert (status.domain, status.domain_number, status.phase, status.step) == ("pubmed", 2, "train", 3)
    assert (status.total_step, status.tokens_seen, status.loss) == (8, 8 * TOKENS_PER_STEP, 2.5)
    # Two steps of 96 tokens at 96 tokens a second.
    assert status.seconds_left == pytest.approx(2 * TOKENS_PER_STEP / 96.0)
    assert (status.stage, status.losses) == ("after acl", {"acl": 4.0, "pubmed": 4.5, "general": 3.1})
    assert status.checkpoint == "000003_pubmed_train_1"
    assert status.notes == ["a stop is requested (file STOP)"]
    text = "\n".join(status.lines())
    for part in (
        f"{root}: running (pid {pid} on ",
        "domain pubmed (2 of 2), phase train, step 3 of 5",
        "8 of 10 steps (80%), 768 tokens",
        "2s at 96 tokens/s",
        "2.5000, logged ",
        "after acl: acl 4.0000, pubmed 4.5000, general 3.1000",
        "000003_pubmed_train_1, saved ",
        "a stop is requested",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"phase": "train", "domain_step": 4, "global_step": 4}, ("acl", "train", 4)),
        ({"phase": "after", "domain_step": 5, "global_step": 5}, ("acl", "after", 5)),
        ({"phase": "evaluate", "domains_done": 1, "global_step": 5}, ("pubmed", "evaluate", 5)),
        ({"phase": "before", "domains_done": 1, "global_step": 5}, ("pubmed", "before", 5)),
        ({"phase": "evaluate", "domains_done": 2, "global_step": 10}, ("pubmed", "evaluate", 10)),
    ],
)
def test_status_of_a_stopped_run_is_that_of_its_checkpoint(
    root: Path, state: dict[str, Any], expected: tuple[str, str, int]
) -> None:
    write_checkpoint(root, "000001_acl_train_1", phase="train", domain_step=1, global_step=1)
    write_checkpoint(root, "000002_acl_x_1", **state)
    write_metrics(root, ("acl", state["global_step"], state["global_step"]))
    status = read_status(root)
    assert (status.state, status.domain, status.phase, status.total_step) == ("stopped", *expected)
    assert status.lines()[0].endswith(": stopped; the same command resumes it")


def test_status_of_a_head_warmup_has_no_steps_of_domains(root: Path) -> None:
    write_checkpoint(root, "000000_acl_head_warmup_0", phase="head_warmup")
    write_metrics(root, ("head_warmup", 7, 7))
    status = read_status(root)
    assert (status.phase, status.step, status.total_step) == ("head_warmup", 7, 0)


@pytest.mark.parametrize("key", ["global_step", "domain_step", "tokens_seen"])
def test_status_leaves_out_a_line_that_has_no_count(root: Path, key: str) -> None:
    write_checkpoint(root, "000001_acl_train_1", phase="train", domain_step=1, global_step=1)
    write_metrics(root, ("acl", 2, 2))
    path = root / "metrics.jsonl"
    row = json.loads(path.read_text())
    path.write_text(
        path.read_text() + json.dumps({**row, "domain_step": 3, "global_step": 3, key: float("inf")}) + "\n"
    )
    assert read_status(root).step == 2


def test_status_of_a_run_without_its_checkpoints_says_so(root: Path) -> None:
    write_metrics(root, ("acl", 2, 2))
    assert read_status(root).notes == ["steps were logged, but there is no checkpoint to resume from"]


def test_status_of_a_lock_that_is_no_file_is_that_of_a_run_that_nobody_holds(root: Path) -> None:
    (root / "run.lock").mkdir()
    assert read_status(root).holder is None


def test_status_of_a_finished_run(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", metrics=False)
    state = {"phase": "finished", "domains_done": 2, "global_step": 10, "tokens_seen": 960}
    write_checkpoint(root, "000009_pubmed_finished_0", **state)
    write_metrics(root, ("pubmed", 5, 10), loss="NaN")
    (root / "hang-rank1.txt").touch()
    status = read_status(root)
    assert (status.state, status.total_step, status.seconds_left, status.loss) == ("finished", 10, 0.0, None)
    text = "\n".join(status.lines())
    assert "steps left" not in text and "not finite, logged" in text and "hang-rank1.txt" in text


def test_status_skips_a_damaged_checkpoint(root: Path) -> None:
    write_checkpoint(root, "000001_acl_train_1", phase="train", domain_step=1, global_step=1)
    damaged = write_checkpoint(root, "000002_acl_train_2", phase="train", domain_step=2, global_step=2)
    (damaged / "manifest.json").write_text("{")
    status = read_status(root)
    assert status.checkpoint == "000001_acl_train_1" and status.step == 1
    (note,) = status.notes
    assert note.startswith("checkpoint 000002_acl_train_2 is damaged and will be skipped: manifest.json")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda root: (root / "config.yaml").unlink(), RunFolderError, "found no config.yaml in it, expected the fold"),
        (lambda root: (root / "config.yaml").write_text("a: 1"), RunFolderError, "its config.yaml cannot be used: "),
        (lambda root: (root / "results.json").write_text("{"), RunFolderError, "results.json: is no JSON object"),
        (lambda root: (root / "metrics.jsonl").mkdir(), RunFolderError, "metrics.jsonl: cannot be read .Is a direc"),
        (
            lambda root: (write_checkpoint(root, "000001_acl_train_1") / "manifest.json").unlink(),
            CheckpointError,
            "checkpoints: found no valid checkpoint, 1 were corrupt",
        ),
    ],
)
def test_status_of_a_damaged_run_is_one_line(
    root: Path, damage: Any, error: type[DasError], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(root)
    with pytest.raises(error, match=message):
        read_status(root)
    assert main(["status", str(root)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("das_ds: ") and printed.count("\n") == 1


def test_status_command_prints_lines_or_json(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(root)]) == 0
    assert capsys.readouterr().out == "\n".join(read_status(root).lines()) + "\n"
    # In a process of its own: libraries that print when they are imported, such as DeepSpeed, must stay out.
    command = [sys.executable, "-m", "das_ds", "status", str(root), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    assert json.loads(done.stdout)["state"] == "not started" and done.stderr == ""
    assert main(["status", str(root / "missing")]) == 2
    assert "found no such folder" in capsys.readouterr().err
