"""A run that is interrupted anywhere resumes there and ends like an uninterrupted one."""

from __future__ import annotations

import shutil
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from das_ds.reporting.results import Results
from helpers.head_warmup import headless_run
from helpers.resume import (
    Place,
    assert_same_run,
    break_off,
    check_a_run_in_pieces_equals_the_complete_run,
    continue_over_another_network,
    run_in_pieces,
)
from helpers.resume import resumable_run as run
from helpers.run_ranks import run_ranks
from helpers.runs import metrics_lines, run_all, save_random_importance, small_run

pytestmark = pytest.mark.multirank


@pytest.mark.parametrize(
    ("stage", "granularity", "precision", "optimizer", "asynchronous"),
    [(3, "parameter", "fp32", "cpu_adam", True), (1, "parameter", "fp16", "adamw", False)],
)
def test_run_in_pieces_equals_uninterrupted_run(
    stage: int, granularity: str, precision: str, optimizer: str, asynchronous: bool, tmp_path: Path
) -> None:
    check_a_run_in_pieces_equals_the_complete_run(stage, granularity, precision, optimizer, asynchronous, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [2, 3])
def test_run_in_pieces_equals_uninterrupted_run_gpu(stage: int, tmp_path: Path) -> None:
    """Its copies are made on a stream of their own; sums on a GPU may differ in their order."""
    runs = [run(tmp_path, name, stage=stage, precision="bf16") for name in ("complete", "parts")]
    run_ranks(run_all, 1, runs[:1])
    run_ranks(run_in_pieces, 1, runs[1], 5)
    mine, theirs = (Results.read(tmp_path / name / "results.json") for name in ("parts", "complete"))
    for row, expected in zip(mine.loss_matrix, theirs.loss_matrix, strict=True):
        assert row == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("granularity", "places"), [("unit", {"train", "after"}), ("parameter", {"train"})])
def test_run_resumes_on_other_ranks_and_stages(granularity: str, places: set[str], tmp_path: Path) -> None:
    """Within a domain, after one, and in an importance pass; without dropout, whose masks belong to ranks."""
    importance: dict[str, Any] = {"num_samples": 24, "granularity": granularity}
    if granularity == "parameter":
        # Two views without dropout are equal, and the gradient of their difference is rounding alone.
        importance["init_from"] = str(save_random_importance(small_run(tmp_path), tmp_path / "initial.safetensors"))

    def values(name: str, stage: int, micro_batch_size: int) -> dict[str, Any]:
        method = {"importance": importance, "view_dropout": 0.0}
        base = run(tmp_path, name, stage=stage, method=method, asynchronous=False, log_interval=1)
        model = small_run(tmp_path)["model"]
        return {**base, "model": model, "train": {**base["train"], "micro_batch_size": micro_batch_size}}

    run_ranks(run_all, 2, [values("complete", 2, 2)])
    breaks: list[Place] = []
    for stage, ranks in cycle(((2, 2), (3, 1), (0, 2), (3, 2), (2, 1))):
        found = run_ranks(break_off, ranks, values("parts", stage, 4 // ranks), 13)[0]
        if found is None:
            break
        breaks.append(found)
        assert len(breaks) < 20, f"no progress: {breaks[-3:]}"
    assert places <= {phase for phase, _, _ in breaks}
    mine, theirs = (Results.read(tmp_path / name / "results.json") for name in ("parts", "complete"))
    assert mine.complete
    for row, expected in zip(mine.loss_matrix, theirs.loss_matrix, strict=True):
        assert row == pytest.approx(expected, abs=1e-4)
    lines = metrics_lines(tmp_path / "parts")
    expected_lines = metrics_lines(tmp_path / "complete")
    assert [line["global_step"] for line in lines] == list(range(1, 13))
    for line, expected_line in zip(lines, expected_lines, strict=True):
        assert line["loss"] == pytest.approx(expected_line["loss"], abs=1e-4)
        assert line["tokens_seen"] == expected_line["tokens_seen"] and line["lr"] == expected_line["lr"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Config of a run that was interrupted, next to the complete run, and a copy of its folder."""
    folder = tmp_path_factory.mktemp("broken_off")
    runs = [run(folder, name) for name in ("complete", "parts")]
    run_ranks(run_all, 2, runs[:1])
    run_ranks(break_off, 2, runs[1], 20)
    return runs[1], shutil.copytree(folder / "parts", folder / "kept")


@pytest.fixture
def broken_off(kept: tuple[dict[str, Any], Path]) -> dict[str, Any]:
    """Config of a run that has just broken off."""
    values, copy = kept
    shutil.rmtree(values["output_dir"])
    shutil.copytree(copy, values["output_dir"])
    return values


@pytest.mark.parametrize("num_damaged", [1, 2])
def test_corrupt_checkpoint_is_named_and_previous_used(num_damaged: int, broken_off: dict[str, Any]) -> None:
    folder = broken_off["output_dir"]
    names = checkpoints(folder)
    assert len(names) == 2
    for name in names[-num_damaged:]:
        file = folder / "checkpoints" / name / "rank_00001_of_00002.safetensors"
        file.write_bytes(file.read_bytes()[:-3])
    if num_damaged == 1:
        run_ranks(run_all, 2, [broken_off])
        assert_same_run(folder, folder.with_name("complete"))
        assert (folder / "checkpoints" / f"{names[-1]}.broken").exists()
        return
    for _ in range(2):
        # Not only at first: a later start must not take the empty folder for a new run either.
        with pytest.raises(RuntimeError, match=r"CheckpointError: .*found no valid checkpoint.*or start over"):
            run_ranks(run_all, 2, [broken_off])


def test_deleted_checkpoints_raise(broken_off: dict[str, Any]) -> None:
    shutil.rmtree(broken_off["output_dir"] / "checkpoints")
    with pytest.raises(RuntimeError, match=r"CheckpointError: .*found metrics.jsonl of training but no checkpoint"):
        run_ranks(run_all, 1, [broken_off])


def test_method_one_resumes(tmp_path: Path) -> None:
    changes = {"lr_scheduler": "infinite", "decay_ratio": 0.5, "log_interval": 1}
    runs = [run(tmp_path, name, method={"name": "one"}, **changes) for name in ("complete", "parts")]
    run_ranks(run_all, 2, runs[:1])
    run_ranks(run_in_pieces, 2, runs[1], 8)
    assert_same_run(tmp_path / "parts", tmp_path / "complete")
    # No model comes from another, so that each domain is first and last.
    found = [line["lr"] for line in metrics_lines(tmp_path / "parts")]
    assert found[:6] == found[6:] and found[5] < found[3]


def test_replay_resumes(tmp_path: Path) -> None:
    """Together with das, with general text in the first domain and food and general text in the second."""
    method = {"importance": {"num_samples": 8}, "replay": {"fraction": 0.25, "general": True}}
    runs = [run(tmp_path, name, method=method) for name in ("complete", "parts", "without")]
    general = {"name": "general", "train": runs[0]["general"]["valid"]}
    runs = [{**values, "general": general} for values in runs]
    runs[2]["method"] = {"name": "das", "importance": {"num_samples": 8}}
    run_ranks(run_all, 2, [runs[0], runs[2]])
    _, breaks = run_ranks(run_in_pieces, 2, runs[1], 9)[0]
    assert any(phase == "train" and step > 0 for phase, _, step in breaks)
    assert_same_run(tmp_path / "parts", tmp_path / "complete")
    lines = metrics_lines(tmp_path / "complete")
    without = metrics_lines(tmp_path / "without")
    assert [line["tokens_seen"] for line in lines] == [line["global_step"] * 8 * 16 for line in lines]
    assert all(line["loss"] != other["loss"] for line, other in zip(lines, without, strict=True))


def test_dga_resumes(tmp_path: Path) -> None:
    """Method dga, with a mask that is not 1 - I itself and is rebuilt from a checkpoint."""
    importance = {"num_samples": 8, "granularity": "parameter", "normalization": "rank_soft", "scope": "group"}
    method = {"name": "dga", "importance": importance, "softmask": {"exponent": 2.0, "unowned_update_scale": 0.5}}
    runs = [run(tmp_path, name, method=method, asynchronous=False) for name in ("complete", "parts")]
    run_ranks(run_all, 1, runs[:1])
    _, breaks = run_ranks(run_in_pieces, 1, runs[1], 5)[0]
    assert {domains_done for phase, domains_done, step in breaks if phase == "train" and step > 0} == {0, 1}
    assert_same_run(tmp_path / "parts", tmp_path / "complete")


def test_ewc_merging_directions_osft_and_regmean_resume(tmp_path: Path) -> None:
    """In pieces bit for bit, and from the middle of the second domain on another number of ranks and stage."""
    methods: dict[str, dict[str, Any]] = {
        "ewc": {"name": "ewc", "lambda": 1e4, "num_samples": 24},
        "merge": {"name": "merge"},
        "directions": {"name": "directions", "num_samples": 24, "merge": {"weight": 0.25}},
        "osft": {"name": "osft", "unfreeze_rank_ratio": 0.5},
        "regmean": {"name": "regmean", "num_samples": 24},
    }
    # So that a start is also interrupted where weights are still to be merged, or within a pass over a sample.
    limits = {"ewc": 8, "merge": 7, "directions": 7, "osft": 7, "regmean": 7}

    def values(name: str, method: str, **changes: Any) -> dict[str, Any]:
        base = run(tmp_path, name, method=methods[method], asynchronous=False, log_interval=1)
        checkpoint = {**base["checkpoint"], "keep_last": 100}
        return {**base, "model": small_run(tmp_path)["model"], "checkpoint": checkpoint, **changes}

    run_ranks(run_all, 2, [values(f"{name}_complete", name) for name in methods])
    others = []
    for name in methods:
        complete = tmp_path / f"{name}_complete"
        parts = tmp_path / f"{name}_parts"
        _, breaks = run_ranks(run_in_pieces, 2, values(parts.name, name), limits[name])[0]
        assert {phase for phase, *_ in breaks} >= {"train", "after"}, breaks
        assert_same_run(parts, complete)
        others.append(tmp_path / f"{name}_other")
        shutil.copytree(complete, others[-1])
        # As if the run had been killed there.
        saved = checkpoints(others[-1])
        for later in saved[saved.index(next(place for place in saved if place.endswith("papers_train_3"))) + 1 :]:
            shutil.rmtree(others[-1] / "checkpoints" / later)
    zero3 = {"zero_optimization": {"stage": 3}}
    run_ranks(run_all, 1, [values(f"{name}_other", name, deepspeed=zero3) for name in methods])
    for name, other in zip(methods, others, strict=True):
        lines = metrics_lines(other)
        expected = metrics_lines(tmp_path / f"{name}_complete")
        assert [line["global_step"] for line in lines] == list(range(1, 13))
        for part in ("loss", "grad_norm"):
            assert [line[part] for line in lines] == pytest.approx([line[part] for line in expected], rel=1e-4)
        mine, theirs = (Results.read(folder / "results.json") for folder in (other, tmp_path / f"{name}_complete"))
        assert mine.loss_matrix[-1] == pytest.approx(theirs.loss_matrix[-1], rel=1e-4)
        assert all(("loss/ewc" in line) == (name == "ewc" and line["domain"] == "papers") for line in lines)
    assert max(line.get("loss/ewc", 0.0) for line in metrics_lines(others[0])) > 1e-3


def test_kd_teacher_resumes_on_same_and_other_ranks(tmp_path: Path) -> None:
    def values(name: str, zero: dict[str, Any], micro_batch_size: int, **train: Any) -> dict[str, Any]:
        changes = {"log_interval": 1, "micro_batch_size": micro_batch_size, **train}
        base = run(tmp_path, name, method={"name": "kd", "weight": 10.0}, asynchronous=False, **changes)
        return {**base, "deepspeed": {"zero_optimization": zero}}

    divided = {"stage": 3, "stage3_param_persistence_threshold": 0}
    runs = [values(name, divided, 2, precision="bf16") for name in ("complete", "parts")]
    run_ranks(run_all, 2, runs[:1])
    _, breaks = run_ranks(run_in_pieces, 2, runs[1], 5)[0]
    assert {domains_done for phase, domains_done, step in breaks if phase == "train" and step > 0} == {0, 1}
    assert_same_run(tmp_path / "parts", tmp_path / "complete")

    def without_dropout(name: str, zero: dict[str, Any], micro_batch_size: int) -> dict[str, Any]:
        return {**values(name, zero, micro_batch_size), "model": small_run(tmp_path)["model"]}

    broken_off = run_ranks(break_off, 2, without_dropout("moved", {"stage": 2}, 2), 19)[0]
    assert broken_off == ("train", 1, 4)
    run_ranks(run_all, 1, [without_dropout("moved", divided, 4)])
    run_ranks(run_all, 2, [without_dropout("still", {"stage": 2}, 2)])
    found, expected = ([line["loss/distillation"] for line in metrics_lines(tmp_path / n)] for n in ("moved", "still"))
    assert found == pytest.approx(expected, rel=1e-3) and expected[-1] > 1e-3


def test_derpp_buffer_resumes_on_same_and_other_ranks(tmp_path: Path) -> None:
    """In fp16 with steps that are tried again; then a causal model on isolated documents, from two ranks to one."""

    def values(name: str, stage: int, micro_batch_size: int, **train: Any) -> dict[str, Any]:
        method = {"name": "derpp", "capacity": 13, "max_positions": 4, "batch_size": 3}
        changes = {"log_interval": 1, "micro_batch_size": micro_batch_size, **train}
        base = run(tmp_path, name, stage=stage, method=method, asynchronous=False, **changes)
        return {**base, "deepspeed": {**base["deepspeed"], "fp16": {"initial_scale_power": 22}}}

    runs = [values(name, 1, 2, precision="fp16") for name in ("complete", "parts")]
    run_ranks(run_all, 2, runs[:1])
    run_ranks(run_in_pieces, 2, runs[1], 5)
    assert_same_run(tmp_path / "parts", tmp_path / "complete")
    assert metrics_lines(tmp_path / "complete")[-1]["skipped_steps"] > 0

    def causal(name: str, stage: int, micro_batch_size: int) -> dict[str, Any]:
        base = values(name, stage, micro_batch_size)
        model = {**small_run(tmp_path)["model"]["config"], "model_type": "llama", "num_key_value_heads": 3}
        model = {name: value for name, value in model.items() if not name.endswith("dropout_prob")}
        return {**base, "model": {"config": model}, "data": {**base["data"], "document_mask": True}}

    assert run_ranks(break_off, 2, causal("moved", 2, 2), 19)[0] == ("train", 1, 4)
    run_ranks(run_all, 1, [causal("moved", 3, 4)])
    run_ranks(run_all, 2, [causal("still", 2, 2)])
    found, expected = (metrics_lines(tmp_path / name) for name in ("moved", "still"))
    for part in ("clm", "der", "replay"):
        losses = [[line[f"loss/{part}"] for line in lines] for lines in (found, expected)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[1][-1] > 1e-3


def test_infinite_schedule_resumes(tmp_path: Path) -> None:
    changes = {"lr_scheduler": "infinite", "warmup_ratio": 0.5, "decay_ratio": 0.5, "log_interval": 1}
    runs = [run(tmp_path, name, method={"name": "ncl"}, **changes) for name in ("complete", "parts")]
    run_ranks(run_all, 1, runs[:1])
    _, breaks = run_ranks(run_in_pieces, 1, runs[1], 5)[0]
    assert {domains_done for phase, domains_done, step in breaks if phase == "train" and step > 0} == {0, 1}
    assert_same_run(tmp_path / "parts", tmp_path / "complete")
    factors = [0, 1 / 3, 2 / 3, 1, 1, 1, *(1, 1, 1, 1, 1 - (1 / 3) ** 0.5, 1 - (2 / 3) ** 0.5)]
    found = [line["lr"] for line in metrics_lines(tmp_path / "parts")]
    assert found == pytest.approx([1e-3 * factor for factor in factors])


def checkpoints(folder: Path) -> list[str]:
    names = (path.name for path in (folder / "checkpoints").glob("*"))
    return sorted(name for name in names if "." not in name)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_resume_with_another_network_raises(num_layers: int, tmp_path: Path) -> None:
    values = headless_run(tmp_path, stage=2, steps=0, checkpoint={"interval": 1}, method={"name": "ncl"})
    message = run_ranks(continue_over_another_network, 1, values, num_layers)[0]
    assert message.startswith("CheckpointError: weights of a checkpoint: found"), message
    assert "roberta.encoder.layer" in message and "more that are not those of this network" in message
