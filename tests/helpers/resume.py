"""Runs that are interrupted at chosen boundaries, as if killed, and restarted."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForMaskedLM

from das_ds.checkpoint.manifest import RunState
from das_ds.config import RunConfig
from das_ds.distributed.process_group import ProcessGroup, init_process_group
from das_ds.errors import DasError
from das_ds.reporting.results import Results
from das_ds.tracking.names import HARDWARE_METRICS
from das_ds.training.save_point import SavePoint
from das_ds.training.train import train
from helpers.configs import changed
from helpers.half import allow_fp16_on_cpu
from helpers.run_ranks import run_ranks
from helpers.runs import metrics_lines, run_all, small_run

DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
MOST_BREAKS = 100
Place = tuple[str, int, int]
"""Phase, domains done, step."""


class BrokenOffError(DasError):
    """Ends a run without saving, closing or reporting anything."""


def resumable_run(
    folder: Path, name: str, *, stage: int = 2, method: Any = None, asynchronous: bool = True, **train: Any
) -> dict[str, Any]:
    """A run with dropout that may be saved at every boundary; logging does not fall on every saved step."""
    base = small_run(folder)
    values = {
        **base,
        "output_dir": folder / name,
        "model": {"config": {**base["model"]["config"], **DROPOUT}},
        "train": {**base["train"], "micro_batch_size": 2, "log_interval": 3, **train},
        "method": {"name": "das", "importance": {"num_samples": 24}},
        "evaluation": {"batch_size": 1, "max_sequences": 4},
        "deepspeed": {"zero_optimization": {"stage": stage}},
        "checkpoint": {"interval": 1, "async_save": asynchronous},
    }
    return values if method is None else changed(values, {"method": method})


def run_in_pieces(values: dict[str, Any], limit: int) -> tuple[Results, list[Place]]:
    """Interrupt every start at its boundary number `limit` until one completes; the places of the interruptions."""
    allow_fp16_on_cpu()
    ranks = init_process_group()
    config = RunConfig(**values)
    breaks = list[Place]()
    while len(breaks) < MOST_BREAKS:
        with suppress(BrokenOffError):
            return _limited_run(config, ranks, limit, breaks), breaks
    raise AssertionError(f"no progress: {breaks[-5:]}")


def _limited_run(config: RunConfig, ranks: ProcessGroup, limit: int, breaks: list[Place]) -> Results:
    passed = 0

    def is_last(run: RunState) -> bool:
        nonlocal passed
        passed += 1
        return passed == limit

    return _breaking_run(config, ranks, is_last, breaks)


def _breaking_run(
    config: RunConfig, ranks: ProcessGroup, is_last: Callable[[RunState], bool], breaks: list[Place]
) -> Results:
    """A start that is interrupted at the first boundary for which `is_last` is true; asked once at each."""
    check = SavePoint.check

    def breaking(self: SavePoint, run: RunState, *, save: bool) -> None:
        check(self, run, save=save)
        if is_last(run):
            breaks.append((run.phase, run.domains_done, run.domain_step))
            raise BrokenOffError

    SavePoint.check = breaking  # type: ignore[method-assign]
    try:
        return train(config, ranks)
    finally:
        SavePoint.check = check  # type: ignore[method-assign]


def run_complete_and_broken(pairs: list[tuple[dict[str, Any], dict[str, Any]]], global_step: int) -> list[Place | str]:
    """Of each pair the first config run at once, the second broken off at a step of training and started again.

    Returns:
        Where each second run was interrupted, or the traceback of a pair that failed.
    """
    ranks = init_process_group()
    return [
        _complete_and_broken(RunConfig(**complete), RunConfig(**broken), global_step, ranks)
        for complete, broken in pairs
    ]


def _complete_and_broken(complete: RunConfig, broken: RunConfig, global_step: int, ranks: ProcessGroup) -> Place | str:
    breaks: list[Place] = []
    steps_per_domain = complete.train.steps_per_domain

    def is_there(run: RunState) -> bool:
        return run.phase == "train" and run.domains_done * steps_per_domain + run.domain_step == global_step

    try:
        train(complete, ranks)
        with suppress(BrokenOffError):
            _breaking_run(broken, ranks, is_there, breaks)
        train(broken, ranks)
    except Exception:
        return traceback.format_exc()
    return breaks[0]


def break_off(values: dict[str, Any], limit: int) -> Place | None:
    """Interrupt one start at boundary number `limit`; its place there, None if it completed before."""
    allow_fp16_on_cpu()
    breaks: list[Place] = []
    with suppress(BrokenOffError):
        _limited_run(RunConfig(**values), init_process_group(), limit, breaks)
    return breaks[0] if breaks else None


def break_off_at(values: dict[str, Any], place: Place) -> bool:
    """Interrupt one start where the run is at a place for the first time; whether it came there."""
    allow_fp16_on_cpu()
    breaks: list[Place] = []

    def is_there(run: RunState) -> bool:
        return (run.phase, run.domains_done, run.domain_step) == place

    with suppress(BrokenOffError):
        _breaking_run(RunConfig(**values), init_process_group(), is_there, breaks)
    return bool(breaks)


def continue_over_another_network(values: dict[str, Any], num_layers: int) -> str:
    """Restart an interrupted run after the folder of its model has another number of layers; the error message."""
    allow_fp16_on_cpu()
    ranks = init_process_group()
    source = Path(values["model"]["name_or_path"])
    config = RunConfig(**values)
    with suppress(BrokenOffError):
        _limited_run(config, ranks, 4, [])
    network = AutoConfig.from_pretrained(source)
    network.num_hidden_layers = num_layers
    AutoModelForMaskedLM.from_config(network).save_pretrained(source)
    try:
        train(config, ranks)
    except DasError as error:
        return f"{type(error).__name__}: {error}"
    return "continued"


def assert_same_run(mine: Path, theirs: Path) -> None:
    """Models, importance, results and metrics agree bit for bit, but for what tells of the machine."""
    found_files = (path.relative_to(theirs) for path in theirs.rglob("*.safetensors"))
    files = sorted(path for path in found_files if path.parts[0] != "checkpoints")
    assert files, f"found nothing in {theirs}"
    for file in files:
        found = load_file(mine / file)
        expected = load_file(theirs / file)
        assert found.keys() == expected.keys(), file
        for name, value in expected.items():
            assert found[name].equal(value), f"{file}: {name}"
    results = [Results.read(run / "results.json").model_copy(update={"wall_seconds": 0.0}) for run in (mine, theirs)]
    assert results[0] == results[1]
    lines = [
        [{k: v for k, v in line.items() if k not in HARDWARE_METRICS} for line in metrics_lines(run)]
        for run in (mine, theirs)
    ]
    assert lines[0] == lines[1]


def assert_tensorboard_has_every_step_once(run: Path) -> None:
    """All lines of metrics.jsonl and all rows of the loss matrix are in TensorBoard's files, at their steps."""
    points = read_tensorboard(run / "tensorboard")
    lines = metrics_lines(run)
    for domain in ("food", "papers"):
        expected = [line for line in lines if line["domain"] == domain]
        assert [step for step, _ in points[f"{domain}/loss"]] == [line["global_step"] for line in expected]
        assert [loss for _, loss in points[f"{domain}/loss"]] == pytest.approx([line["loss"] for line in expected])
    results = Results.read(run / "results.json")
    for column, corpus in enumerate(results.eval_domains):
        losses = [row[column] for row in results.loss_matrix]
        assert [loss for _, loss in points[f"eval/{corpus}"]] == pytest.approx(losses)


def read_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) of every scalar that later files leave valid, in the order in which it was written."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    points: dict[str, list[tuple[int, float]]] = {}
    # A name ends with the number of the file in its process; by name, 10 would come before 9 of the same second.
    for path in sorted(folder.iterdir(), key=lambda path: int(path.suffix[1:])):
        for event in EventFileLoader(str(path)).Load():
            if event.HasField("session_log"):
                points = {tag: [point for point in values if point[0] < event.step] for tag, values in points.items()}
            for value in event.summary.value:
                array = make_ndarray(value.tensor)
                if array.dtype.kind == "f" and array.ndim == 0:
                    points.setdefault(value.tag, []).append((event.step, float(array)))
    return points


def check_a_run_in_pieces_equals_the_complete_run(
    stage: int, granularity: str, precision: str, optimizer: str, asynchronous: bool, folder: Path
) -> None:
    """On two ranks; each start is interrupted at its fifth boundary."""
    changes = {"precision": precision, "optimizer": optimizer, "asynchronous": asynchronous}
    method = {"importance": {"num_samples": 24, "granularity": granularity}}
    runs = [resumable_run(folder, name, stage=stage, method=method, **changes) for name in ("complete", "parts")]
    runs[1]["tracking"] = ["tensorboard"]
    run_ranks(run_all, 2, runs[:1])
    _, breaks = run_ranks(run_in_pieces, 2, runs[1], 5)[0]
    # How far a start comes beyond its newest checkpoint is chance where these are written in the background.
    met = {phase for phase, _, _ in breaks}
    assert met == {"evaluate", "before", "train", "after"} if not asynchronous else "train" in met
    assert_same_run(folder / "parts", folder / "complete")
    assert_tensorboard_has_every_step_once(folder / "parts")
