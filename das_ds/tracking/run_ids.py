"""Identity of a run in a library of metrics: one small file per library in the run folder, kept when a run resumes."""

from __future__ import annotations

import re
from pathlib import Path

from das_ds.config import RunConfig
from das_ds.errors import RunFolderError
from das_ds.run_dir import WANDB_RUN_ID_FILE
from das_ds.storage import atomic_write


def stored_run_id(folder: Path, file: str = WANDB_RUN_ID_FILE) -> str | None:
    """Identity in a run folder; None before its first use, or if the file is damaged.

    Args:
        folder: the run folder.
        file: name of the library's file.
    """
    path = folder / file
    if path.exists() and re.fullmatch(r"[A-Za-z0-9_.-]{1,128}", run_id := path.read_text().strip()):
        return run_id
    return None


def store_run_id(folder: Path, run_id: str, file: str = WANDB_RUN_ID_FILE) -> None:
    """Log to this run of the library from now on.

    Raises:
        RunFolderError: the disk is full, or the folder cannot be written.
    """
    path = folder / file
    try:
        with atomic_write(path) as partial:
            partial.write_text(run_id + "\n")
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be written ({error.strerror}); expected free space") from error


def run_name(config: RunConfig) -> str:
    """Name of a run: that of its folder."""
    return config.output_dir.resolve().name


def group_name(config: RunConfig) -> str:
    """Name of the group of a run: that of the folder of its folder."""
    return config.output_dir.resolve().parent.name
