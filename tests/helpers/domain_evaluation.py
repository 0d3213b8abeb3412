"""Runs with evaluations within domains, compared with runs without, in pieces, and by their exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from das_ds.config import RunConfig
from das_ds.distributed.process_group import init_process_group
from das_ds.reporting.results import Results
from das_ds.training.evaluate import evaluate_model
from helpers.configs import changed
from helpers.resume import assert_same_run, resumable_run, run_in_pieces
from helpers.run_ranks import run_ranks
from helpers.runs import exported_weights, metrics_lines, run_all

NCL = {"name": "ncl"}


def evaluated_run(folder: Path, name: str, *, stage: int = 2, faults: Any = None, **evaluation: Any) -> dict[str, Any]:
    """A run with dropout, six steps per domain and evaluations after every second."""
    values = resumable_run(folder, name, stage=stage, method=NCL, asynchronous=False)
    section = {**values["evaluation"], "every_steps": 2, **evaluation}
    return changed(values, {"evaluation": section, "faults": {"max_forgetting": faults}})


def read_results(folder: Path, name: str) -> Results:
    """Results of a run."""
    return Results.read(folder / name / "results.json")


def evaluate_folders(values: dict[str, Any], folders: list[Path]) -> list[dict[str, float]]:
    """Losses of exported models."""
    ranks = init_process_group()
    return [evaluate_model(RunConfig(**values), ranks, folder) for folder in folders]


def is_step(line: dict[str, Any]) -> bool:
    """Whether a line of the metrics is that of a step, not of an evaluation."""
    return "loss" in line


def check_evaluations_leave_training_as_it_is(stage: int, folder: Path, **train: Any) -> None:
    """Same weights and losses with dropout, on two ranks, and evaluations equal to those after the domains."""
    evaluated = changed(evaluated_run(folder, "evaluated", stage=stage, keep_best=True), {"train": train})
    plain = changed(
        evaluated_run(folder, "plain", stage=stage, every_steps=None), {"train": {"log_interval": 1, **train}}
    )
    run_ranks(run_all, 2, [plain, evaluated])
    for domain in ("00_food", "01_papers"):
        mine, theirs = (exported_weights(folder / name, domain) for name in ("evaluated", "plain"))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    mine, theirs = (read_results(folder, name) for name in ("evaluated", "plain"))
    assert mine.loss_matrix == theirs.loss_matrix
    assert theirs.evaluations == [] and theirs.ends == []
    # Logged every third step and at every evaluation.
    lines = metrics_lines(folder / "evaluated")
    norms = {line["global_step"]: line["grad_norm"] for line in metrics_lines(folder / "plain")}
    found = {line["global_step"]: line["grad_norm"] for line in lines if is_step(line)}
    assert list(found) == [2, 3, 4, 6, 8, 9, 10, 12]
    assert all(norms[step] == norm for step, norm in found.items())
    for line in filter(is_step, lines):
        # A CPU has no data sheet.
        assert line["model_tflops"] > 0.0 and 0.0 <= line["data_wait"] < 1.0 and "mfu" not in line
    check_records(mine, lines)


def check_records(results: Results, lines: list[dict[str, Any]]) -> None:
    """Every evaluation is recorded and logged once; what the loss matrix has too is equal."""
    expected = [(domain, step) for domain in ("food", "papers") for step in (0, 2, 4, 6)]
    assert [(record.domain, record.step) for record in results.evaluations] == expected
    logged = [line for line in lines if not is_step(line)]
    assert [(line["domain"], line["domain_step"]) for line in logged] == expected
    for record, line in zip(results.evaluations, logged, strict=True):
        assert line["global_step"] == record.global_step
        assert {name: value for name, value in line.items() if name.startswith("eval/")} == {
            f"eval/{corpus}": loss for corpus, loss in record.losses.items()
        }
        corpora = ["food", "general"] if record.domain == "food" else ["food", "papers", "general"]
        assert list(record.losses) == corpora
    rows = [dict(zip(results.eval_domains, row, strict=True)) for row in results.loss_matrix]
    # Right before and after a domain the model is that of a row; naive training changes nothing in between.
    for number, row in ((0, rows[0]), (3, rows[1]), (4, rows[1]), (7, rows[2])):
        losses = results.evaluations[number].losses
        assert losses == {corpus: row[corpus] for corpus in losses}


def check_run_in_pieces_equals_the_complete_run(
    stage: int, folder: Path, limit: int, *, num_ranks: int = 2, **changes: Any
) -> None:
    """Each start is interrupted at its boundary number `limit`, also in the middle of an evaluation."""
    runs = [evaluated_run(folder, name, stage=stage, **changes) for name in ("complete", "parts")]
    run_ranks(run_all, num_ranks, runs[:1])
    _, breaks = run_ranks(run_in_pieces, num_ranks, runs[1], limit)[0]
    assert len([phase for phase, _, _ in breaks if phase == "train"]) > 1
    assert_same_run(folder / "parts", folder / "complete")


def check_exports_have_the_recorded_losses(values: dict[str, Any], folder: Path, num_ranks: int) -> None:
    """Each exported model has the losses recorded at the step that the results name."""
    run_ranks(run_all, num_ranks, [values])
    results = read_results(folder, values["output_dir"].name)
    which = "last" if values["evaluation"]["continue_from"] == "best" else "best"
    folders = []
    expected = []
    for number, end in enumerate(results.ends):
        place = values["output_dir"] / "domains" / f"{number:02d}_{end.domain}"
        other_step = end.step if which == "last" else end.best_step
        for name, step in (("model", end.model_step), (which, other_step)):
            folders.append(place / name)
            expected.append(next(r.losses for r in results.evaluations if (r.domain, r.step) == (end.domain, step)))
            assert f"; {step} steps of 8 sequences" in (place / name / "README.md").read_text()
    # In fp32 and on one rank, in batches of other sizes.
    found = run_ranks(evaluate_folders, 1, values, folders)[0]
    for losses, wanted in zip(found, expected, strict=True):
        assert {corpus: losses[corpus] for corpus in wanted} == pytest.approx(wanted, rel=1e-5)
