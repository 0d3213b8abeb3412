"""The result file of a tier: everything that tables and pictures are made of, without the run folders."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.domains.jobs import TrainingRun
from benchmarks.environment import RESULTS, describe
from das_ds.config_io import load_config
from das_ds.durable import replaced_file
from das_ds.tracking.names import METRICS_FILE, PEAK_MEMORY_GIB, TOKENS_PER_S

FORMAT_VERSION = 1


def run_row(label: str, run: TrainingRun) -> dict[str, Any]:
    """One run that is done."""
    config = load_config(run.config)
    lines = [json.loads(line) for line in (run.folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()]
    return {
        "label": label,
        "seed": config.seed,
        "learning_rate": config.train.learning_rate,
        "method": config.method.model_dump(mode="json"),
        "results": run.results().model_dump(mode="json"),
        "tokens_per_s": statistics.median(line[TOKENS_PER_S] for line in lines),
        "peak_memory_gib": max(line[PEAK_MEMORY_GIB] for line in lines),
    }


def result_path(tier: str, device: torch.device) -> Path:
    """Where a tier's results are committed."""
    return RESULTS / f"domains_{tier}_{device.type}.json"


def write_record(path: Path, content: dict[str, Any], device: torch.device) -> None:
    """Write a result file in place of the one before."""
    whole = {"format_version": FORMAT_VERSION, "environment": describe(device), **content}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as partial:
        partial.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def run_rows(runs: dict[str, Iterable[TrainingRun]]) -> list[dict[str, Any]]:
    """Rows of all runs that are done, by label."""
    return [run_row(label, run) for label, of_label in runs.items() for run in of_label if run.is_done()]
