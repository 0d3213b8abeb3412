"""Evaluations within domains at other stages, precisions and numbers of ranks, and what ends a domain."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from das_ds.checkpoint.manifest import DomainEnd, read_manifest
from das_ds.reporting.results import Results
from helpers.configs import changed
from helpers.domain_evaluation import (
    check_evaluations_leave_training_as_it_is,
    check_exports_have_the_recorded_losses,
    check_run_in_pieces_equals_the_complete_run,
    evaluated_run,
    is_step,
    read_results,
)
from helpers.resume import break_off
from helpers.run_ranks import run_ranks
from helpers.runs import exported_weights, metrics_lines, run_all, small_run
from helpers.tiny_tokenizer import tiny_tokenizer

pytestmark = pytest.mark.multirank

WORSE = {"learning_rate": 0.3, "lr_scheduler": "constant_with_warmup", "warmup_ratio": 0.0}
"""A rate at which a tiny model soon harms other text."""
RISING = {"learning_rate": 0.3, "lr_scheduler": "constant_with_warmup", "warmup_ratio": 0.99}
"""A rate that rises from step to step, so that a model first gets better and then worse."""


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp16"), (2, "bf16"), (3, "bf16")])
def test_training_is_bitwise_that_without_evaluations(stage: int, precision: str, tmp_path: Path) -> None:
    check_evaluations_leave_training_as_it_is(stage, tmp_path, precision=precision)


@pytest.mark.parametrize(("stage", "limit"), [(0, 3), (2, 7)])
def test_run_stopped_within_evaluations_equals_uninterrupted_run(stage: int, limit: int, tmp_path: Path) -> None:
    stopping = {"patience": 1, "min_delta": 0.05}
    check_run_in_pieces_equals_the_complete_run(
        stage, tmp_path, limit, continue_from="best", keep_best=True, early_stopping=stopping
    )


def test_evaluations_are_the_same_on_other_ranks_and_resume_there(tmp_path: Path) -> None:
    def values(name: str, stage: int, micro_batch_size: int) -> dict[str, Any]:
        base = evaluated_run(tmp_path, name, stage=stage, keep_best=True)
        train = {"micro_batch_size": micro_batch_size}
        return {**changed(base, {"train": train}), "model": small_run(tmp_path)["model"]}

    run_ranks(run_all, 2, [values("still", 2, 2)])
    assert run_ranks(break_off, 2, values("moved", 2, 2), 10)[0] == ("train", 0, 4)
    # In the middle of the second evaluation of the first domain.
    newest = max((tmp_path / "moved" / "checkpoints").iterdir())
    done = read_manifest(newest).metadata["loops"]["done"]
    assert done == [["evaluate food", 2], ["evaluate general", 1]]
    run_ranks(run_all, 1, [values("moved", 3, 4)])
    mine, theirs = (read_results(tmp_path, name) for name in ("moved", "still"))
    assert [(r.domain, r.step, r.global_step) for r in mine.evaluations] == [
        (r.domain, r.step, r.global_step) for r in theirs.evaluations
    ]
    for found, expected in zip(mine.evaluations, theirs.evaluations, strict=True):
        assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert mine.ends == theirs.ends
    lines = [line for line in metrics_lines(tmp_path / "moved") if not is_step(line)]
    assert len(lines) == len(mine.evaluations)


@pytest.mark.parametrize("continue_from", ["last", "best"])
@pytest.mark.parametrize("stage", [0, 3])
def test_exports_have_the_recorded_losses(stage: int, continue_from: str, tmp_path: Path) -> None:
    values = evaluated_run(tmp_path, "run", stage=stage, keep_best=True, continue_from=continue_from)
    values = changed(values, {"train": RISING})
    check_exports_have_the_recorded_losses(values, tmp_path, 2)
    results = read_results(tmp_path, "run")
    assert any(end.best_step != end.step for end in results.ends)
    for number, end in enumerate(results.ends):
        own = {r.step: r.losses[end.domain] for r in results.evaluations if r.domain == end.domain and r.step > 0}
        assert own[end.best_step] == min(own.values())
        assert end.model_step == (end.best_step if continue_from == "best" else 6)
        # The run goes on with that model.
        row = dict(zip(results.eval_domains, results.loss_matrix[number + 1], strict=True))
        assert row[end.domain] == own[end.model_step]


def test_best_export_of_lora_equals_the_model_that_goes_on(tmp_path: Path) -> None:
    """Whether `best/` is written from kept weights or from the present ones, it has the same files."""
    lora = {"model": {**small_run(tmp_path)["model"], "lora": {"rank": 2}}}
    train = {**RISING, "learning_rate": 1.0, "micro_batch_size": 4}
    runs = [
        changed(evaluated_run(tmp_path, name, keep_best=True, continue_from=name), {**lora, "train": train})
        for name in ("last", "best")
    ]
    run_ranks(run_all, 1, [{**values, "domains": values["domains"][:1]} for values in runs])
    (end,) = read_results(tmp_path, "last").ends
    assert end.best_step != end.step
    folders = {name: tmp_path / name / "domains" / "00_food" for name in ("last", "best")}
    for of_last, of_best in (
        ("best", "model"),
        ("model", "last"),
        ("best_adapter", "adapter"),
        ("adapter", "last_adapter"),
    ):
        (file,) = (folders["last"] / of_last).glob("*.safetensors")
        mine, theirs = load_file(file), load_file(folders["best"] / of_best / file.name)
        assert mine.keys() == theirs.keys()
        assert all(mine[name].equal(theirs[name]) for name in mine), of_last


def test_early_stopping_ends_a_domain_and_the_run_goes_on(tmp_path: Path) -> None:
    values = evaluated_run(tmp_path, "run", early_stopping={"patience": 1, "min_delta": 100.0})
    run_ranks(run_all, 2, [changed(values, {"train": {"log_interval": 100}})])
    results = read_results(tmp_path, "run")
    # The first evaluation is an improvement, the second is not.
    assert results.ends == [
        DomainEnd(domain=domain, reason="early_stopping", step=4, best_step=4, model_step=4)
        for domain in ("food", "papers")
    ]
    assert results.complete and results.tokens_seen == 8 * 16 * 8
    steps = [line for line in metrics_lines(tmp_path / "run") if is_step(line)]
    assert [(line["global_step"], line["domain_step"]) for line in steps] == [(2, 2), (4, 4), (6, 2), (8, 4)]
    # Rates are those of a domain of six steps, of which two are left out.
    assert steps[1]["lr"] == steps[3]["lr"] == pytest.approx(1e-3 * 3 / 6)
    text = (tmp_path / "run" / "report" / "report.md").read_text()
    assert "early stopping" in text


@pytest.mark.parametrize(
    ("action", "expected"),
    [("warn", ("steps", 6, 6)), ("stop", ("max_forgetting", 2, 2)), ("rollback", ("max_forgetting", 2, 0))],
)
def test_exceeded_limit_on_forgetting_follows_its_action(
    action: str, expected: tuple[str, int, int], tmp_path: Path
) -> None:
    """Naive training at a rate that soon harms other text; the first domain has only general text to forget."""
    limits = {"earlier": 1e-3, "action": action}
    values = changed(evaluated_run(tmp_path, "run", faults=limits), {"train": WORSE})
    run_ranks(run_all, 2, [values])
    results = read_results(tmp_path, "run")
    first, second = results.ends
    assert (first.reason, first.step, first.model_step) == ("steps", 6, 6)
    assert (second.reason, second.step, second.model_step) == expected
    check_rows(results)
    before, after = (exported_weights(tmp_path / "run", domain) for domain in ("00_food", "01_papers"))
    assert all(before[name].equal(after[name]) for name in before) == (action == "rollback")


def test_limit_on_general_text_returns_to_the_last_step_that_kept_it(tmp_path: Path) -> None:
    """The second domain harms general text more and more at first."""
    run_ranks(run_all, 2, [changed(evaluated_run(tmp_path, "free"), {"train": RISING})])
    losses = [r.losses["general"] for r in read_results(tmp_path, "free").evaluations]
    of_food, of_papers = ([loss - part[0] for loss in part] for part in (losses[:4], losses[4:]))
    assert max(*of_food, 0.0) < of_papers[1] < of_papers[2]
    limits = {"general": (of_papers[1] + of_papers[2]) / 2, "action": "rollback"}
    run_ranks(run_all, 2, [changed(evaluated_run(tmp_path, "limited", faults=limits), {"train": RISING})])
    results = read_results(tmp_path, "limited")
    assert results.ends[0].reason == "steps"
    assert results.ends[1] == DomainEnd(domain="papers", reason="max_forgetting", step=4, best_step=2, model_step=2)
    check_rows(results)


def check_rows(results: Results) -> None:
    """The row after each domain is that of the step whose model the run went on with."""
    for number, end in enumerate(results.ends):
        row = dict(zip(results.eval_domains, results.loss_matrix[number + 1], strict=True))
        kept = next(r.losses for r in results.evaluations if (r.domain, r.step) == (end.domain, end.model_step))
        assert {corpus: row[corpus] for corpus in kept} == kept


def test_causal_run_has_bits_per_byte(tmp_path: Path) -> None:
    base = small_run(tmp_path)
    model = {**base["model"]["config"], "model_type": "llama", "num_key_value_heads": 3}
    model = {name: value for name, value in model.items() if not name.endswith("dropout_prob")}
    values = {**evaluated_run(tmp_path, "run"), "model": {"config": model}}
    run_ranks(run_all, 1, [{**values, "domains": values["domains"][:1]}])
    results = read_results(tmp_path, "run")
    assert results.bits_per_byte is not None
    # General text is evaluated in its first 4 blocks, which are of its first documents.
    tokenizer = tiny_tokenizer()
    documents = (tmp_path / "general.txt").read_text().splitlines()
    lengths = [len(tokenizer(document)["input_ids"]) for document in documents]
    touched = next(n for n in range(len(lengths)) if sum(lengths[:n]) >= 4 * 16)
    num_bytes = sum(len(document.encode()) for document in documents[:touched])
    ratio = sum(lengths[:touched]) / num_bytes
    found = [row[-1] for row in results.bits_per_byte]
    assert found == pytest.approx([row[-1] / math.log(2) * ratio for row in results.loss_matrix])
    lines = [line for line in metrics_lines(tmp_path / "run") if not is_step(line)]
    assert [line["bits_per_byte/general"] for line in lines[:1]] == pytest.approx(found[:1])
    assert all("bits_per_byte/food" in line for line in lines)
