"""The folder of a run: opened once per start, never mixed with another run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from das_ds.config import RunConfig
from das_ds.config.stage import stage_folder
from das_ds.config_io import config_differences, dump_config, load_config
from das_ds.distributed.stopping import SAVE_FILE, STOP_FILE
from das_ds.errors import RunFolderError
from das_ds.evaluation.end_task_scores import BASE_FOLDER

PROBE = ".preflight-"
"""Beginning of the names of what a preflight writes for a moment."""
CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class RunFolder:
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


def open_run_folder(config: RunConfig) -> RunFolder:
    """Create the run folder, or enter that of the same run.

    Raises:
        RunFolderError: it holds something else, another run, or cannot be written.
    """
    root = config.output_dir
    recorded = root / CONFIG_FILE
    try:
        root.mkdir(parents=True, exist_ok=True)
        if recorded.exists():
            _check_same_run(config, recorded)
        elif not all(_may_come_first(path) for path in root.iterdir()):
            raise RunFolderError(
                f"output_dir: {root} is not empty and holds no run (no {CONFIG_FILE}); use another folder"
            )
        else:
            dump_config(config, recorded)
    except OSError as error:
        raise RunFolderError(f"output_dir: cannot write to {root}: {error.strerror or error}") from error
    return RunFolder(root)


def _may_come_first(path: Path) -> bool:
    """What users ask for or score before the run begins, and what a preflight that was killed leaves behind."""
    return path.name in (STOP_FILE, SAVE_FILE, BASE_FOLDER) or path.name.startswith(PROBE)


def _check_same_run(config: RunConfig, recorded: Path) -> None:
    differences = config_differences(load_config(recorded), config)
    if differences:
        raise RunFolderError(
            f"output_dir: {recorded.parent} belongs to another run; its config differs in {'; '.join(differences)}; "
            "use another folder or the same config"
        )
