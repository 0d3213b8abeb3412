"""A run over three domains that uses what runs use every day, all at once, interrupted everywhere.

A decoder learns two domains with settings of their own, the first of them a mixture, with evaluations within domains,
the best model, limits on forgetting, evaluation-only corpora and all numbers that are measured; then a second run
continues it with a further mixture.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from das_ds.reporting.results import Results
from helpers.continued import DECODER, complete
from helpers.mixed_domains import mixed_run
from helpers.resume import assert_same_run, break_off, run_in_pieces
from helpers.run_ranks import run_ranks
from helpers.runs import metrics_lines, run_all

pytestmark = pytest.mark.multirank


def first_run(folder: Path, name: str) -> dict[str, Any]:
    values = mixed_run(
        folder,
        name,
        evaluation={"every_steps": 2, "keep_best": True, "base_divergence": True, "max_sequences": 8, "batch_size": 1},
        faults={"max_forgetting": {"general": 0.01, "earlier": 0.01, "action": "rollback"}},
        train={"log_group_norms": True},
        checkpoint={"interval": 1, "async_save": False},
    )
    values["model"] = {"config": DECODER}
    values["method"] = {"name": "directions", "num_samples": 16, "replay": {"general": False}}
    return values


def further_run(folder: Path, name: str, earlier: str) -> dict[str, Any]:
    """What a user writes, with all that it takes from the earlier run."""
    (folder / "notes.txt").write_text("the notes of twelve weeks were held in the garden\n" * 30)
    sources = [
        {"train": [str(folder / "recipes.txt")], "weight": 0.25},
        {"train": [str(folder / "notes.txt")], "weight": 0.75},
    ]
    domain = {"name": "notes", "sources": sources, "valid_fraction": 0.2, "steps": 5, "learning_rate": 5e-4}
    values = {
        "output_dir": folder / name,
        "continue_from": str(folder / earlier),
        "domains": [{**domain, "replay": {"fraction": 0.25}}],
        "wandb": {"mode": "disabled"},
    }
    return complete(values)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    run_ranks(run_all, 2, [first_run(folder, "first")])
    run_ranks(run_all, 2, [further_run(folder, "further", "first")])
    return folder


def test_all_is_measured(whole: Path) -> None:
    results = Results.read(whole / "further" / "results.json")
    assert results.complete and results.domains == ["food", "papers", "notes"] and len(results.loss_matrix) == 4
    assert results.eval_domains == ["food", "papers", "notes", "general", "law", "code"]
    assert results.bits_per_byte is not None and len(results.base_divergences) == 3
    assert all(value is not None and value > 0.0 for value in results.base_divergences)
    assert {record.domain for record in results.evaluations} == {"food", "papers", "notes"}
    assert [end.domain for end in results.ends] == ["food", "papers", "notes"]
    steps = [line for line in metrics_lines(whole / "further") if "loss" in line]
    assert steps and all("grad_norm/attention" in line and "plasticity" in line for line in steps)


@pytest.mark.parametrize("limit", [3, 5])
def test_interrupted_runs_equal_uninterrupted_ones(limit: int, whole: Path) -> None:
    name = f"parts{limit}"
    _, breaks = run_ranks(run_in_pieces, 2, first_run(whole, name), limit)[0]
    assert {phase for phase, *_ in breaks} >= {"train", "evaluate"}
    assert_same_run(whole / name, whole / "first")
    _, breaks = run_ranks(run_in_pieces, 2, further_run(whole, f"{name}_further", name), limit)[0]
    assert "train" in {phase for phase, *_ in breaks}
    assert_same_run(whole / f"{name}_further", whole / "further")


def test_run_that_goes_on_with_one_rank_agrees(whole: Path) -> None:
    values = first_run(whole, "fewer")
    assert run_ranks(break_off, 2, values, 9)[0] is not None
    run_ranks(run_all, 1, [values])
    further = further_run(whole, "fewer_further", "fewer")
    assert run_ranks(break_off, 2, further, 6)[0] is not None
    run_ranks(run_all, 1, [further])
    mine, theirs = (Results.read(whole / name / "results.json") for name in ("fewer_further", "further"))
    for row, expected in zip(mine.loss_matrix, theirs.loss_matrix, strict=True):
        assert row == pytest.approx(expected, rel=1e-3)
    assert mine.base_divergences == pytest.approx(theirs.base_divergences, rel=1e-2)
    weights, expected_weights = (
        load_file(whole / name / "domains" / "02_notes" / "model" / "model.safetensors")
        for name in ("fewer_further", "further")
    )
    assert all(torch.allclose(weights[name], value, rtol=1e-3, atol=1e-4) for name, value in expected_weights.items())
