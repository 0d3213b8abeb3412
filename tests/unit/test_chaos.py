"""The parts of `make chaos` that decide whether a run is equal and a checkpoint damaged."""

import json
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.chaos.corruptions import CORRUPTIONS
from benchmarks.chaos.progress_log import EVALUATION, START, TRAINING, Mark, ProgressLog
from benchmarks.chaos.run_digest import differences, run_digest
from benchmarks.chaos.timeline import Timeline


def finished_run(folder: Path) -> Path:
    """The files of a run that are compared."""
    model = folder / "domains" / "00_food" / "model"
    model.mkdir(parents=True)
    save_file({"weight": torch.arange(6.0), "bias": torch.zeros(2)}, model / "model.safetensors", {"format": "pt"})
    (model / "config.json").write_text("{}")
    save_file({"head": torch.ones(3)}, folder / "importance.safetensors")
    (folder / "results.json").write_text(json.dumps({"loss_matrix": [[1.5]], "wall_seconds": 7.0}))
    lines = [{"global_step": 3, "loss": 2.0, "tokens_per_s": 10.0}, {"global_step": 6, "loss": 1.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def flip(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda run: flip(run / "domains/00_food/model/model.safetensors", -1), "domains/00_food/model/model.saf"),
        (lambda run: flip(run / "importance.safetensors", -1), "importance.safetensors: head"),
        (lambda run: (run / "domains/00_food/model/config.json").write_text("{ }"), "domains/00_food/model/config"),
        (lambda run: (run / "importance.safetensors").unlink(), "importance.safetensors: head"),
        (lambda run: (run / "results.json").write_text('{"loss_matrix": [[1.25]]}'), "results.json: loss_matrix"),
        (lambda run: (run / "metrics.jsonl").write_text('{"global_step": 3, "loss": 2.0}\n'), "metrics.jsonl: 2"),
    ],
)
def test_differences_names_each_change(tmp_path: Path, change, named: str) -> None:  # type: ignore[no-untyped-def]
    expected = run_digest(finished_run(tmp_path / "a"))
    run = finished_run(tmp_path / "b")
    change(run)
    found = differences(expected, run_digest(run))
    assert len(found) == 1 and found[0].startswith(named)


def test_differences_ignores_time(tmp_path: Path) -> None:
    expected = run_digest(finished_run(tmp_path / "a"))
    run = finished_run(tmp_path / "b")
    (run / "results.json").write_text(json.dumps({"loss_matrix": [[1.5]], "wall_seconds": 9.0}))
    metrics = (run / "metrics.jsonl").read_text().replace('"tokens_per_s": 10.0', '"tokens_per_s": 3.0')
    (run / "metrics.jsonl").write_text(metrics.replace('"loss": 1.0', '"loss": 1.0, "checkpoint_stall_s": 0.1'))
    assert not differences(expected, run_digest(run))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("corrupt", CORRUPTIONS)
def test_corruptions_alter_the_checkpoint(tmp_path: Path, corrupt, seed: int) -> None:  # type: ignore[no-untyped-def]
    for name, content in (("manifest.json", '{"files": {"a": 12}}'), ("a", "twelve bytes"), ("b", "others")):
        (tmp_path / name).write_text(content)
    before = contents(tmp_path)
    assert corrupt(tmp_path, Random(seed))
    assert contents(tmp_path) != before
    if (tmp_path / "manifest.json").exists():
        json.loads((tmp_path / "manifest.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_progress_log_round_trip(tmp_path: Path) -> None:
    progress_log = ProgressLog(tmp_path / "progress")
    assert progress_log.last() is None
    progress_log.add(START, "start")
    progress_log.add(TRAINING, "train food", 4)
    assert [mark.spot for mark in progress_log.marks()] == [(START, "start", 0), (TRAINING, "train food", 4)]
    assert progress_log.last() == progress_log.marks()[-1]
    progress_log.close()


def test_count_repeated_from_resumed_spot() -> None:
    evaluation = [Mark(1.0 + n, EVALUATION, "evaluate food", n) for n in range(2)]
    training = [Mark(3.0 + n, TRAINING, "train food", n) for n in range(3)]
    timeline = Timeline([Mark(0.0, START, "start", 0), *evaluation, *training], save_seconds=0.0)
    assert timeline.count_repeated(training[2].spot, training[1].spot) == (2, 0)
    assert timeline.count_repeated(training[0].spot, evaluation[1].spot) == (1, 1)
    assert timeline.count_repeated(training[0].spot, training[1].spot) == (0, 0)
    assert timeline.is_first(evaluation[0]) and not timeline.is_first(training[0])
