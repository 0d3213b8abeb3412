"""The tutorials from beginning to end in an empty folder: their commands, their output, and what they claim."""

from __future__ import annotations

from pathlib import Path

import pytest

from das_ds.reporting.results import Results
from das_ds.run_dir import RESULTS_FILE
from helpers.commands import ROOT
from helpers.tutorials import missing_lines, read_steps, run_step

pytestmark = pytest.mark.timeout(3600)


def run_tutorial(name: str, folder: Path) -> dict[str, Results]:
    """Run a tutorial, and give the results of its runs."""
    for step in read_steps(ROOT / "docs" / "tutorials" / f"{name}.md"):
        printed = run_step(step, folder)
        assert missing_lines(step.shown, printed) == [], "\n".join(printed)
    return {path.parent.name: Results.read(path) for path in folder.glob(f"runs/*/{RESULTS_FILE}")}


def loss(results: Results, corpus: str, stage: int = -1) -> float:
    return results.loss_matrix[stage][results.eval_domains.index(corpus)]


def test_two_domains_encoder_forgets_less_at_better_learning(tmp_path: Path) -> None:
    runs = run_tutorial("two_domains_encoder", tmp_path)
    assert set(runs) == {"base", "directions", "ncl", "ncl_low"} and all(run.complete for run in runs.values())
    forgotten = {name: loss(run, "python") - loss(run, "python", 1) for name, run in runs.items() if name != "base"}
    assert forgotten["directions"] < 0.8 * forgotten["ncl"]
    assert forgotten["directions"] < forgotten["ncl_low"]
    assert loss(runs["directions"], "formulas") < loss(runs["ncl_low"], "formulas")
    # The first domain has nothing to protect.
    assert runs["directions"].loss_matrix[1] == runs["ncl"].loss_matrix[1]


def test_decoder_general_ability_keeps_more_with_protection_and_replay(tmp_path: Path) -> None:
    runs = run_tutorial("decoder_general_ability", tmp_path)
    assert set(runs) == {"base", "directions", "ncl", "ncl_low", "replay", "directions_replay"}
    assert all(run.complete for run in runs.values())
    drift = {name: loss(run, "general") - loss(run, "general", 0) for name, run in runs.items() if name != "base"}
    assert drift["directions_replay"] < 0.6 * drift["ncl"]
    assert drift["directions_replay"] < min(drift["directions"], drift["replay"])
    assert drift["directions"] < drift["ncl"] and drift["replay"] < drift["ncl"]
    # C++ is learned by all of them.
    assert all(loss(run, "cpp") < loss(run, "cpp", 0) - 1.5 for name, run in runs.items() if name != "base")
