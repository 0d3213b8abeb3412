"""Every method at ZeRO 3 on two ranks: it learns, leaves the promised files, and continues from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM

from das_ds.config import RunConfig
from das_ds.config.io import load_config
from das_ds.functional.importance import elementwise_maximum
from das_ds.methods import METHODS
from das_ds.models.architectures.registry import spec_for
from das_ds.preflight.output_dir import check_folder
from das_ds.reporting.results import Results
from das_ds.run_dir import RESULTS_FILE
from das_ds.softmask.importance_file import load_unit_importance
from das_ds.tracking.names import STEP_METRICS
from helpers.preflight import Alone, silent_checks
from helpers.resume import Place, assert_same_run, resumable_run, run_complete_and_broken
from helpers.run_ranks import run_ranks
from helpers.runs import metrics_lines, save_random_importance, small_run, start_errors

pytestmark = pytest.mark.multirank

STEPS_PER_DOMAIN = 6
BREAK_STEP = 9
IMPORTANCE = {"num_samples": 10}
SETTINGS: dict[str, dict[str, Any]] = {
    "das": {"importance": IMPORTANCE},
    "derpp": {"capacity": 13, "max_positions": 4, "batch_size": 3},
    "dga": {"importance": IMPORTANCE},
    "directions": {"num_samples": 10, "merge": {"weight": 0.25}},
    "ewc": {"lambda": 1e4, "num_samples": 10},
    "freeze": {"num_layers": 1},
    "kd": {"weight": 10.0},
    "l2": {"lambda": 1.0},
    "regmean": {"num_samples": 10},
    "stm": {"max_perplexity": 300.0},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "das-parameter": {"name": "das", "importance": {**IMPORTANCE, "granularity": "parameter"}},
    "das-first-moment": {"name": "das", "importance": IMPORTANCE, "softmask": {"apply_to": "first_moment"}},
    "ncl-rates-by-layer": {"name": "ncl"},
    "das-replay-kl": {"name": "das", "importance": IMPORTANCE, "replay": {"fraction": 0.25, "loss": "kl"}},
}
TRAIN: dict[str, dict[str, Any]] = {"ncl-rates-by-layer": {"layer_lr_decay": 0.7}}
CASES = {**{name: {"name": name, **SETTINGS.get(name, {})} for name in METHODS}, **VARIANTS}


def values(folder: Path, name: str, case: str) -> dict[str, Any]:
    """Few and large batches: at ZeRO 3 most of the time goes into the number of forward passes."""
    changes = {"log_interval": 1, "micro_batch_size": 4, **TRAIN.get(case, {})}
    run = resumable_run(folder, name, stage=3, method=CASES[case], asynchronous=False, **changes)
    evaluation = {"batch_size": 12, "max_sequences": 24}
    return {**run, "checkpoint": {**run["checkpoint"], "interval": 3}, "evaluation": evaluation}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Place | str]]:
    """Folder with each case `<case>` and, broken off once, `<case>-broken`; where that was, or what failed."""
    folder = tmp_path_factory.mktemp("methods")
    pairs = [(values(folder, case, case), values(folder, f"{case}-broken", case)) for case in CASES]
    pairs[list(CASES).index("das")][0]["wandb"] = {"mode": "offline"}
    places = run_ranks(run_complete_and_broken, 2, pairs, BREAK_STEP, timeout=540.0)[0]
    return folder, dict(zip(CASES, places, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_methods_resumed_run_equals_uninterrupted(case: str, finished: tuple[Path, dict[str, Place | str]]) -> None:
    folder, places = finished
    assert places[case] == (("train", 0, BREAK_STEP) if case == "pool" else ("train", 1, BREAK_STEP - STEPS_PER_DOMAIN))
    assert_same_run(folder / f"{case}-broken", folder / case)


@pytest.mark.parametrize("name", METHODS)
def test_methods_learn_two_domains_and_write_files(name: str, finished: tuple[Path, dict[str, Place | str]]) -> None:
    folder = finished[0] / name
    result = Results.read(folder / RESULTS_FILE)
    assert result.complete and result.method == name and result.world_size == 2 and result.zero_stage == 3
    assert result.eval_domains == ["food", "papers", "general"]
    assert result.tokens_seen == 2 * STEPS_PER_DOMAIN * 8 * 16
    assert result.loss_matrix[0] == Results.read(finished[0] / "ncl" / RESULTS_FILE).loss_matrix[0]
    assert result.loss_matrix[1][0] < result.loss_matrix[0][0]
    assert result.loss_matrix[-1][1] < result.loss_matrix[0][1]
    assert len(result.loss_matrix) == 1 + len(result.learned) == (2 if name == "pool" else 3)
    assert load_config(folder / "config.yaml").method.name == name
    assert (folder / "report" / "report.md").exists() and (folder / "report" / "loss_matrix.png").exists()
    _check_metrics(folder, has_contrast=name in ("das", "dga"), is_pool=name == "pool")


def _check_metrics(folder: Path, *, has_contrast: bool, is_pool: bool) -> None:
    lines = metrics_lines(folder)
    steps = list(range(1, STEPS_PER_DOMAIN + 1))
    assert [line["global_step"] for line in lines] == list(range(1, 2 * STEPS_PER_DOMAIN + 1))
    assert [line["domain_step"] for line in lines] == (list(range(1, 13)) if is_pool else steps * 2)
    assert [line["domain"] for line in lines] == (["pool"] * 12 if is_pool else ["food"] * 6 + ["papers"] * 6)
    for line in lines:
        assert set(STEP_METRICS) <= set(line)
        assert ("loss/contrast" in line) == has_contrast
        assert line["loss"] == pytest.approx(sum(value for key, value in line.items() if key.startswith("loss/")))
        assert line["tokens_seen"] == line["global_step"] * 8 * 16
        assert line["grad_norm"] > 0 and line["tokens_per_s"] > 0


def test_das_importance_is_maximum_over_domains(finished: tuple[Path, dict[str, Place | str]]) -> None:
    folder = finished[0] / "das"
    model = AutoModelForMaskedLM.from_pretrained(folder / "domains" / "01_papers" / "model")
    layout = spec_for("roberta").layout(model)
    parts = ["importance_general", "domains/00_food/importance", "domains/01_papers/importance"]
    total = None
    for part in parts:
        total = elementwise_maximum(load_unit_importance(folder / f"{part}.safetensors", layout), total)
    found = load_unit_importance(folder / "importance.safetensors", layout)
    assert total is not None and all(torch.equal(found[group], total[group]) for group in found)


def test_methods_write_own_files_only(finished: tuple[Path, dict[str, Place | str]]) -> None:
    folder, _ = finished
    assert (folder / "das" / "wandb_run_id").exists()
    assert len(list((folder / "das" / "wandb").glob("offline-run-*/*.wandb"))) == 1
    assert not (folder / "ncl" / "importance.safetensors").exists()
    # Method dga measures general knowledge alone.
    files = [path.name for path in (folder / "dga").rglob("importance*.safetensors")]
    assert files == ["importance_general.safetensors"]
    assert (folder / "dga" / "report" / "importance.png").exists()


def test_file_that_does_not_fit_ends_run_before_results(tmp_path: Path) -> None:
    """A wrong path, and importance of another network: nothing is evaluated, and the folder is not claimed."""
    other = small_run(tmp_path / "other")
    other["model"]["config"]["num_hidden_layers"] = 3
    path = save_random_importance(other, tmp_path / "other.safetensors")
    weights = {"granularity": "parameter", "init_from": str(path)}
    methods = {
        "directions": {"name": "directions", "init_from": str(tmp_path / "none.safetensors")},
        "das": {"name": "das", "importance": weights},
    }
    runs = {name: small_run(tmp_path / name, method=method) for name, method in methods.items()}
    no_file, other_network = run_ranks(start_errors, 2, list(runs.values()))[0]
    assert "none.safetensors: cannot read directions" in no_file
    assert f"{path}: importance of another model" in other_network
    for name, values in runs.items():
        folder = RunConfig(**values).output_dir
        assert not (folder / RESULTS_FILE).exists() and not metrics_lines(folder), name
        checks = silent_checks(Alone())
        assert check_folder(checks, RunConfig(**values, seed=8), Alone()), checks.results
