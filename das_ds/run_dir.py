"""The folder of a run: opened once per start, never mixed with another run."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from das_ds.config import RunConfig
from das_ds.config.io import config_differences, dump_config, load_config
from das_ds.config.stage import stage_folder
from das_ds.errors import ConfigError, RunFolderError

logger = logging.getLogger(__name__)

PROBE = ".preflight-"
"""Beginning of the names of what a preflight writes for a moment."""
CONFIG_FILE = "config.yaml"
RESULTS_FILE = "results.json"
COMPARISON_FILE = "comparison.json"
REPORT_FOLDER = "report"
STOP_FILE = "STOP"
SAVE_FILE = "SAVE"
LOCK_FILE = "run.lock"
IMPORTANCE_FILE = "importance.safetensors"
"""Of a domain in its folder, accumulated in the run folder."""
GENERAL_IMPORTANCE_FILE = "importance_general.safetensors"
DIRECTIONS_FILE = "directions.safetensors"
"""The same of directions."""
END_TASKS_FILE = "end_tasks.json"
BASE_FOLDER = "base"
"""Folder in a run folder for the scores of the model that the run starts from."""
METRICS_FILE = "metrics.jsonl"
WANDB_RUN_ID_FILE = "wandb_run_id"
LOSS_MATRIX_PLOT = "loss_matrix.png"
IMPORTANCE_PLOT = "importance.png"
REPORT_FILE = "report.md"
CHECKPOINTS_DIR = "checkpoints"
PARTIAL = ".partial-"
"""Beginning of the name of a checkpoint that is being written."""
REPLACED_CONFIG_FILE = "config.replaced.yaml"
"""The config of a start that failed before anything was computed, after which another took the folder."""
REVISIONS_FILE = "revisions.json"
"""Commits of the hub's models and data sets that the run began with."""
WANDB_FOLDER, HANG_REPORT = "wandb", "hang-rank"


@dataclass(frozen=True)
class RunDir:
    """Paths of a run."""

    root: Path

    def domain(self, index: int, name: str) -> Path:
        """Folder of one domain: `domains/<ii>_<name>`."""
        return self.root / stage_folder(index, name)

    def model(self, index: int, name: str) -> Path:
        """Exported model after one domain."""
        return self.domain(index, name) / "model"

    def adapter(self, index: int, name: str) -> Path:
        """LoRA weights after one domain."""
        return self.domain(index, name) / "adapter"


def open_run_dir(config: RunConfig) -> RunDir:
    """Create the run folder, or enter that of the same run.

    A folder whose starts all failed before anything was computed takes the config of this start.

    Raises:
        RunFolderError: it holds something else, another run, or cannot be written.
    """
    root = config.output_dir
    recorded = root / CONFIG_FILE
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not holds_same_run(config):
            if recorded.exists():
                logger.warning("%s: nothing was trained there yet; its config is replaced by that of this start", root)
                recorded.replace(root / REPLACED_CONFIG_FILE)
            for name in (WANDB_RUN_ID_FILE, REVISIONS_FILE):
                (root / name).unlink(missing_ok=True)
            dump_config(config, recorded)
    except OSError as error:
        raise RunFolderError(f"output_dir: cannot write to {root}: {error.strerror or error}") from error
    return RunDir(root)


def holds_same_run(config: RunConfig) -> bool:
    """Whether the folder holds this run; False: the run may begin there.

    Raises:
        RunFolderError: the folder holds something else or another run.
        OSError: it cannot be read.
    """
    root = config.output_dir
    recorded = root / CONFIG_FILE
    if recorded.exists():
        return _is_same_run(config, recorded)
    if not all(_may_come_first(path) for path in root.iterdir()):
        raise RunFolderError(f"output_dir: {root} is not empty and holds no run (no {CONFIG_FILE}); use another folder")
    return False


def _is_same_run(config: RunConfig, recorded: Path) -> bool:
    root = recorded.parent
    try:
        differences = config_differences(load_config(recorded), config)
        reason = f"its config differs in {'; '.join(differences)}"
    except ConfigError as error:
        # Of another version of das_ds, or written by hand.
        differences = [CONFIG_FILE]
        reason = f"its {CONFIG_FILE} cannot be used: {error}"
    if differences and not all(_may_come_first(path) or _is_of_a_failed_start(path) for path in root.iterdir()):
        raise RunFolderError(
            f"output_dir: {root} belongs to another run; {reason}; use another folder or the same config"
        )
    return not differences


def _may_come_first(path: Path) -> bool:
    """What users ask for or score before the run begins, and what a start or preflight that was killed leaves."""
    names = (STOP_FILE, SAVE_FILE, BASE_FOLDER, LOCK_FILE)
    return path.name in names or path.name.startswith((PROBE, f".{CONFIG_FILE}."))


def _is_of_a_failed_start(path: Path) -> bool:
    """Whether it is there before the first results: no metrics, no checkpoint, nothing that was computed."""
    if path.name == METRICS_FILE:
        return not path.stat().st_size
    if path.name == CHECKPOINTS_DIR:
        return all(entry.name.startswith(PARTIAL) for entry in path.iterdir())
    names = (CONFIG_FILE, REPLACED_CONFIG_FILE, REVISIONS_FILE, WANDB_RUN_ID_FILE, WANDB_FOLDER)
    return path.name in names or path.name.startswith(HANG_REPORT)
