"""Run folders as a run leaves them, with results made by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from das_ds.config.io import dump_config
from das_ds.downstream.scores import EndTaskScores, Scores, SeedScores, SeedStatistics, TaskScores
from das_ds.models.architectures.registry import spec_for
from das_ds.reporting.results import build_results
from das_ds.run_dir import END_TASKS_FILE, RESULTS_FILE
from das_ds.softmask.importance_file import save_parameter_importance, save_unit_importance
from helpers.tiny_models import tiny_model
from helpers.training import run_config

DOMAINS = ("acl", "pubmed")
LOSSES = [[6.0, 5.0, 3.0], [4.0, 4.5, 3.1], [4.5, 3.0, 3.4]]


def write_run(
    folder: Path,
    *,
    shift: float = 0.0,
    num_rows: int = 3,
    domains: Sequence[str] = DOMAINS,
    corpus: dict[str, str] | None = None,
    metrics: bool = True,
    **changes: Any,
) -> Path:
    """A run over two domains and general text.

    Args:
        folder: to make.
        shift: added to every loss.
        num_rows: of the loss matrix.
        domains: their names.
        corpus: further keys of every domain.
        metrics: write metrics.jsonl too.
        changes: nested dictionaries of config keys.
    """
    folder.mkdir(parents=True)
    corpora = [{"name": name, "train": ["unused.txt"], **(corpus or {})} for name in domains]
    config = run_config(folder, domains=corpora, **{"method": {"name": "ncl"}, **changes})
    dump_config(config, folder / "config.yaml")
    at_once = config.method.name == "pool"
    results = build_results(
        method=config.method.name,
        domains=domains,
        eval_domains=[*domains, "general"],
        loss_matrix=[[loss + shift for loss in row] for row in LOSSES[: 2 if at_once else num_rows]],
        tokens_seen=1000,
        wall_seconds=90.0,
        world_size=2,
        zero_stage=0,
        learned=[list(domains)] if at_once else None,
    )
    results.write(folder / RESULTS_FILE)
    if metrics:
        lines = [{"tokens_per_s": rate, "peak_memory_gib": 0.5 + rate / 1000} for rate in (10.0, 300.0, 200.0)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_task(folder: Path, place: str, score: float) -> None:
    """The score of task acl_arc after one stage of a run."""
    scores = Scores(accuracy=0.0, macro_f1=score, micro_f1=0.0)
    task = TaskScores(
        domain=None,
        metric="macro_f1",
        labels=["no", "yes"],
        settings={},
        seeds=[SeedScores(seed=0, epochs=1, best_epoch=1, dev=scores, test=scores)],
        dev=SeedStatistics(mean=score, deviation=None),
        test=SeedStatistics(mean=score, deviation=None),
    )
    (folder / place).mkdir(parents=True, exist_ok=True)
    EndTaskScores(model="0", tasks={"acl_arc": task}).write(folder / place / END_TASKS_FILE)


def write_unit_importance(folder: Path, values: dict[str, float]) -> None:
    """Importance by unit: file within the folder -> what every second unit has; the others have half of it."""
    layout = spec_for("roberta").layout(tiny_model())
    for name, value in values.items():
        importance = layout.zeros()
        for units in importance.values():
            units[:] = value / 2
            units[:, ::2] = value
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_unit_importance(folder / name, importance, layout)


def write_weight_importance(folder: Path, values: dict[str, dict[str, int]], others: int) -> dict[str, int]:
    """Importance by weight: file -> beginning of a parameter's name -> 255ths; `others` elsewhere.

    Returns:
        Parameter -> number of weights.
    """
    layout = spec_for("roberta").layout(tiny_model())
    for name, by_parameter in values.items():
        tensors = {
            parameter: torch.full((size,), _value(parameter, by_parameter, others), dtype=torch.uint8)
            for parameter, size in layout.sizes.items()
        }
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_parameter_importance(folder / name, tensors, layout)
    return layout.sizes


def _value(parameter: str, by_parameter: dict[str, int], others: int) -> int:
    return next((value for part, value in by_parameter.items() if part in parameter), others)
