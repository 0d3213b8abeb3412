"""Load a run folder: its config, results, metrics, importance and end-task scores, summarized for a comparison."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from das_ds.config import RunConfig
from das_ds.config.io import load_config
from das_ds.errors import ConfigError, RunFolderError
from das_ds.reporting.comparison import Cost, RunSummary
from das_ds.reporting.importance_stats import summarize_importance
from das_ds.reporting.results import Results
from das_ds.reporting.score_matrix import read_run_scores
from das_ds.run_dir import CONFIG_FILE, METRICS_FILE, RESULTS_FILE
from das_ds.tracking.names import PEAK_MEMORY_GIB, TOKENS_PER_S


@dataclass(frozen=True)
class LoadedRun:
    """A run folder with its config and results."""

    path: Path
    label: str | None
    """Label of its group, if one was given."""
    config: RunConfig
    results: Results

    @property
    def name(self) -> str:
        """The last two parts of its path."""
        return "/".join(self.path.resolve().parts[-2:])


def load_run(argument: str) -> LoadedRun:
    """Load a command-line argument: a run folder, or LABEL=RUN.

    Raises:
        RunFolderError: it is not a run folder with results, or these are damaged.
    """
    label, path = _parse_argument(argument)
    if not (path / RESULTS_FILE).exists():
        found = "no such folder" if not path.is_dir() else f"no {RESULTS_FILE} in it"
        raise RunFolderError(f"{path}: found {found}, expected the folder of a run that was evaluated")
    results = Results.read(path / RESULTS_FILE)
    try:
        config = load_config(path / CONFIG_FILE)
    except ConfigError as error:
        raise RunFolderError(f"{path}: its {CONFIG_FILE} cannot be used: {error}") from error
    return LoadedRun(path, label, config, results)


def summarize_run(run: LoadedRun) -> RunSummary:
    """Everything that a comparison stores about one run, which must be complete.

    Raises:
        DasError: a file with importance, end-task scores or metrics is damaged.
    """
    results = run.results
    return RunSummary(
        seed=run.config.seed,
        folder=run.name,
        loss_matrix=results.loss_matrix,
        learned_rows=list(results.rows_learned.values()),
        forgetting=results.forgetting.average,
        forgetting_per_domain=results.forgetting.per_domain,
        general_drift=results.general_drift,
        drift=results.drift,
        forward_transfer=results.forward_transfer,
        end_tasks=read_run_scores(run.path),
        importance=summarize_importance(run.path, run.config.model),
        cost=_cost(run),
        versions=results.versions,
    )


def _parse_argument(argument: str) -> tuple[str | None, Path]:
    label, equals, path = argument.partition("=")
    # A folder may have an equals sign in its name.
    if not equals or Path(argument).is_dir():
        return None, Path(argument)
    if not label.strip() or "|" in label:
        raise RunFolderError(f"{argument}: found label {label!r}, expected LABEL=RUN with a label without '|'")
    return label.strip(), Path(path)


def _cost(run: LoadedRun) -> Cost:
    path = run.path / METRICS_FILE
    lines = _read_metrics(path) if path.exists() else []
    rates = [float(line[TOKENS_PER_S]) for line in lines if TOKENS_PER_S in line]
    peaks = [float(line[PEAK_MEMORY_GIB]) for line in lines if PEAK_MEMORY_GIB in line]
    return Cost(
        wall_seconds=run.results.wall_seconds,
        num_ranks=run.results.world_size,
        tokens_seen=run.results.tokens_seen,
        tokens_per_s=statistics.median(rates) if rates else None,
        peak_memory_gib=max(peaks) if peaks else None,
    )


def _read_metrics(path: Path) -> list[dict[str, float]]:
    lines = []
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be read ({error.strerror}); expected the metrics of a run") from error
    for number, text in enumerate(content.splitlines(), start=1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict):
            raise RunFolderError(f"{path}: line {number} is not a JSON object; move the file away to omit its costs")
        for key in (TOKENS_PER_S, PEAK_MEMORY_GIB):
            if not isinstance(line.get(key, 0.0), int | float):
                raise RunFolderError(
                    f"{path}: line {number}: {key}: found {line[key]!r}, expected a number; move the file away to omit "
                    "its costs"
                )
        lines.append(line)
    return lines
