"""Results of a run: built from its state, and written to the run folder, the report and the tracker."""

from __future__ import annotations

from pathlib import Path

from das_ds.checkpoint.manifest import RunState
from das_ds.config import RunConfig
from das_ds.errors import RunFolderError
from das_ds.functional.units import UnitValues
from das_ds.reporting.results import Results, build_results
from das_ds.reporting.run_report import write_report
from das_ds.run_dir import CURVES_PLOT, IMPORTANCE_PLOT, LOSS_MATRIX_PLOT, PLASTICITY_FILE, PLASTICITY_PLOT, RunDir
from das_ds.softmask.plasticity import DomainPlasticity, PlasticityReading
from das_ds.tracking.names import CURVES, IMPORTANCE, LOSS_MATRIX, PASSING_ENERGY, PLASTICITY
from das_ds.tracking.tracker import Tracker
from das_ds.training.data_module import loss_columns


def collect_results(config: RunConfig, state: RunState, world_size: int, zero_stage: int) -> Results:
    """Results of all evaluations so far.

    Raises:
        TrainingError: a loss is not finite.
    """
    return build_results(
        method=config.method.name,
        domains=[domain.name for domain in config.domains],
        eval_domains=loss_columns(config),
        loss_matrix=state.loss_matrix,
        tokens_seen=state.tokens_seen,
        wall_seconds=state.wall_seconds,
        world_size=world_size,
        zero_stage=zero_stage,
        learned=config.learned,
        others=[corpus.name for corpus in config.evaluate_on],
        weights=state.weights,
        tokens_per_byte=state.tokens_per_byte,
        evaluations=state.evaluations,
        ends=state.ends,
        base_divergences=state.base_divergences,
    )


def publish_results(
    results: Results,
    run_dir: RunDir,
    tracker: Tracker,
    row: dict[str, float],
    state: RunState,
    importance: UnitValues | None,
) -> None:
    """Write results and report to the run folder, and log them to the tracker.

    Args:
        results: after the newest evaluation.
        run_dir: of the run.
        tracker: of the run.
        row: corpus -> loss of the newest evaluation.
        state: position and history of the run.
        importance: by unit; None where the method has none.

    Raises:
        RunFolderError: the folder cannot be written or is full.
    """
    num_rows = _num_published_rows(run_dir.results_file)
    results.write(run_dir.results_file)
    report = write_report(run_dir.root, results, importance)
    if num_rows == len(results.loss_matrix):
        # The run ended between publishing and its next checkpoint; sinks would have this evaluation twice.
        return
    tracker.log_evaluation(row, domains_learned=len(results.losses_learned), global_step=state.global_step)
    tracker.log_table(LOSS_MATRIX, *results.table)
    tracker.log_image(LOSS_MATRIX, report / LOSS_MATRIX_PLOT)
    if importance is not None:
        tracker.log_image(IMPORTANCE, report / IMPORTANCE_PLOT)
    if results.evaluations:
        tracker.log_image(CURVES, report / CURVES_PLOT)
    if (report / PLASTICITY_PLOT).exists():
        tracker.log_image(PLASTICITY, report / PLASTICITY_PLOT)
    tracker.log_summary(results.summary)


def _num_published_rows(path: Path) -> int:
    """Rows of the loss matrix in results.json; 0 if there is none that can be read."""
    try:
        return len(Results.read(path).loss_matrix)
    except RunFolderError:
        return 0


def write_plasticity(folder: Path, measured: DomainPlasticity) -> None:
    """Write what was measured of a domain to its folder.

    Raises:
        RunFolderError: the folder cannot be written or is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(
            f"{folder}: cannot be made ({error.strerror}); the run folder must be writable and have free space"
        ) from error
    measured.write(folder / PLASTICITY_FILE)


def plasticity_metrics(reading: PlasticityReading) -> dict[str, float]:
    """Metrics of all layers together, for the lines of metrics.jsonl; those that were not measured are missing."""
    metrics = {PLASTICITY: reading.plasticity, PASSING_ENERGY: reading.passing}
    return {name: value for name, value in metrics.items() if value is not None}
