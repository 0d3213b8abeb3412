"""Run folder: the names of all its files, and the check that a folder belongs to one run only."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from das_ds.config import RunConfig
from das_ds.config.io import config_differences, dump_config, load_config
from das_ds.config.stage import stage_folder
from das_ds.errors import ConfigError, RunFolderError

logger = logging.getLogger(__name__)

PROBE = ".preflight-"
"""Beginning of the names of temporary files of a preflight."""
CONFIG_FILE = "config.yaml"
RESULTS_FILE = "results.json"
COMPARISON_FILE = "comparison.json"
REPORT_FOLDER = "report"
STOP_FILE = "STOP"
SAVE_FILE = "SAVE"
LOCK_FILE = "run.lock"
IMPORTANCE_FILE = "importance.safetensors"
"""Importance of one domain in its folder, accumulated importance in the run folder."""
GENERAL_IMPORTANCE_FILE = "importance_general.safetensors"
DIRECTIONS_FILE = "directions.safetensors"
"""Input covariances, in the same two folders."""
END_TASKS_FILE = "end_tasks.json"
BENCHMARKS_FILE = "benchmarks.json"
"""Scores of one model on public benchmarks, in the same folders."""
BASE_FOLDER = "base"
"""Folder in a run folder for the scores of the model that the run starts from."""
HUB_FILE = "hub.json"
"""Where on the hub the model of one domain is, in its folder."""
PLASTICITY_FILE = "plasticity.json"
"""What earlier domains leave one domain to learn, in its folder."""
GENERATED_FOLDER = "generated"
"""Text that the model wrote before one domain, in its folder."""
METRICS_FILE = "metrics.jsonl"
LAST_STEP_FILE = "metrics.last_step"
"""Last step that was ever logged, once metrics.jsonl has been cut at an earlier one."""
WANDB_RUN_ID_FILE = "wandb_run_id"
MLFLOW_RUN_ID_FILE = "mlflow_run_id"
TRACKIO_RUN_NAME_FILE = "trackio_run_name"
TRACKING_ID_FILES = (WANDB_RUN_ID_FILE, MLFLOW_RUN_ID_FILE, TRACKIO_RUN_NAME_FILE)
"""Each has the name under which a library continues the run."""
LOSS_MATRIX_PLOT = "loss_matrix.png"
CURVES_PLOT = "curves.png"
IMPORTANCE_PLOT = "importance.png"
PLASTICITY_PLOT = "plasticity.png"
REPORT_FILE = "report.md"
HTML_REPORT_FILE = "index.html"
CHECKPOINTS_DIR = "checkpoints"
STAGING_PREFIX = ".partial-"
"""Beginning of the name of a checkpoint that is being written."""
REPLACED_CONFIG_FILE = "config.replaced.yaml"
"""Config of an earlier start that failed before anything was computed and was replaced."""
REVISIONS_FILE = "revisions.json"
"""Commits of the hub's models and data sets that the run began with."""
WANDB_FOLDER = "wandb"
TENSORBOARD_FOLDER = "tensorboard"
MLFLOW_FOLDER = "mlflow"
"""Database and artifacts, unless MLFLOW_TRACKING_URI names another place."""
HANG_REPORT = "hang-rank"
"""Beginning of the names of the watchdog's stack dumps."""


@dataclass(frozen=True)
class RunDir:
    """Paths of the files and folders of a run.

    output_dir/
      config.yaml, results.json, metrics.jsonl, importance.safetensors ...
      checkpoints/<number>_<domain>_<phase>_<step>/
      domains/<ii>_<name>/model/, adapter/, best/ or last/, plasticity.json, hub.json
      report/
    """

    root: Path

    @property
    def config_file(self) -> Path:
        """The resolved config of the run."""
        return self.root / CONFIG_FILE

    @property
    def results_file(self) -> Path:
        """Loss matrix and forgetting."""
        return self.root / RESULTS_FILE

    @property
    def metrics_file(self) -> Path:
        """One line of JSON per logged step."""
        return self.root / METRICS_FILE

    @property
    def revisions_file(self) -> Path:
        """Commits of the hub's models and data sets that the run began with."""
        return self.root / REVISIONS_FILE

    @property
    def stop_file(self) -> Path:
        """Its presence asks the run to save and stop."""
        return self.root / STOP_FILE

    @property
    def save_file(self) -> Path:
        """Its presence asks the run to save and continue."""
        return self.root / SAVE_FILE

    @property
    def checkpoints_dir(self) -> Path:
        """Folder of all checkpoints."""
        return self.root / CHECKPOINTS_DIR

    def domain(self, index: int, name: str) -> Path:
        """Folder of one domain: `domains/<ii>_<name>`."""
        return self.root / stage_folder(index, name)

    def model(self, index: int, name: str) -> Path:
        """Exported model after one domain."""
        return self.domain(index, name) / "model"

    def adapter(self, index: int, name: str) -> Path:
        """LoRA weights after one domain."""
        return self.domain(index, name) / "adapter"

    def hub_record(self, index: int, name: str) -> Path:
        """What was uploaded of the model after one domain."""
        return self.domain(index, name) / HUB_FILE

    def other_model(self, index: int, name: str, which: str) -> Path:
        """Exported model of another step of one domain: `best`, or `last`."""
        return self.domain(index, name) / which

    def other_adapter(self, index: int, name: str, which: str) -> Path:
        """LoRA weights of that step."""
        return self.domain(index, name) / f"{which}_adapter"

    def generated(self, index: int, name: str) -> Path:
        """Text that the model wrote before one domain, as token blocks."""
        return self.domain(index, name) / GENERATED_FOLDER

    def hang_report(self, rank: int) -> Path:
        """Stacks of a rank that the watchdog ended."""
        return self.root / f"{HANG_REPORT}{rank}.txt"


def earlier_run_dirs(config: RunConfig) -> Iterator[tuple[RunDir, int]]:
    """(folder, stages that count) of the run that a run continues, of the one that this continued, and so on.

    Where a folder of the chain is no longer there, or its config is damaged, the chain ends with it.
    """
    limit = config.num_earlier
    while config.continue_from is not None:
        run_dir = RunDir(config.continue_from.run)
        yield run_dir, limit
        try:
            config = load_config(run_dir.config_file)
        except ConfigError:
            return
        limit = min(limit, config.num_earlier)


def recorded_earlier_run_dirs(run_dir: RunDir) -> list[tuple[RunDir, int]]:
    """The same by the config that a run folder records; [] without one that can be read."""
    try:
        return list(earlier_run_dirs(load_config(run_dir.config_file)))
    except ConfigError:
        return []


def model_run_dir(config: RunConfig, num_learned: int) -> RunDir:
    """The run folder that has the model after so many stages, which an earlier run may have learned."""
    found = RunDir(config.output_dir)
    for run_dir, limit in earlier_run_dirs(config):
        if num_learned <= limit:
            found = run_dir
    return found


def open_run_dir(config: RunConfig) -> RunDir:
    """Create the run folder, or open that of the same run.

    In a folder whose starts all failed before anything was computed, this start's config replaces theirs.

    Raises:
        RunFolderError: it contains something else, another run, or cannot be written.
    """
    run_dir = RunDir(config.output_dir)
    root = run_dir.root
    recorded = run_dir.config_file
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not holds_same_run(config):
            if recorded.exists():
                logger.warning("%s: nothing was trained there yet; its config is replaced by that of this start", root)
                recorded.replace(root / REPLACED_CONFIG_FILE)
            for name in (*TRACKING_ID_FILES, REVISIONS_FILE):
                (root / name).unlink(missing_ok=True)
            dump_config(config, recorded)
    except OSError as error:
        raise RunFolderError(f"output_dir: cannot write to {root}: {error.strerror or error}") from error
    return run_dir


def holds_same_run(config: RunConfig) -> bool:
    """Whether the folder contains this run; False: the run may start there.

    Raises:
        RunFolderError: the folder contains something else or another run.
        OSError: it cannot be read.
    """
    root = config.output_dir
    recorded = RunDir(root).config_file
    if recorded.exists():
        return _is_same_run(config, recorded)
    if not all(_may_come_first(path) for path in root.iterdir()):
        raise RunFolderError(
            f"output_dir: {root} is not empty and contains no run (no {CONFIG_FILE}); use another folder"
        )
    return False


def _is_same_run(config: RunConfig, recorded: Path) -> bool:
    root = recorded.parent
    try:
        differences = config_differences(load_config(recorded), config)
        reason = f"its config differs in {'; '.join(differences)}"
    except ConfigError as error:
        # Written by another version of das_ds, or by hand.
        differences = [CONFIG_FILE]
        reason = f"its {CONFIG_FILE} cannot be used: {error}"
    if differences and not all(_may_come_first(path) or _is_of_a_failed_start(path) for path in root.iterdir()):
        raise RunFolderError(
            f"output_dir: {root} belongs to another run; {reason}; use another folder or the same config"
        )
    return not differences


def _may_come_first(path: Path) -> bool:
    """Files allowed before the first start: stop and save requests, base-model scores, leftovers of killed starts."""
    names = (STOP_FILE, SAVE_FILE, BASE_FOLDER, LOCK_FILE)
    return path.name in names or path.name.startswith((PROBE, f".{CONFIG_FILE}."))


def _is_of_a_failed_start(path: Path) -> bool:
    """Whether a failed start may have left it: no logged metrics, no complete checkpoint, nothing computed."""
    if path.name == METRICS_FILE:
        return not path.stat().st_size
    if path.name == CHECKPOINTS_DIR:
        return all(entry.name.startswith(STAGING_PREFIX) for entry in path.iterdir())
    folders = (WANDB_FOLDER, TENSORBOARD_FOLDER, MLFLOW_FOLDER)
    names = (CONFIG_FILE, REPLACED_CONFIG_FILE, REVISIONS_FILE, *TRACKING_ID_FILES, *folders)
    return path.name in names or path.name.startswith(HANG_REPORT)
