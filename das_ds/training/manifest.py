"""What a run has done so far: typed, versioned, written last, so that it never claims what is not there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from das_ds.errors import RunFolderError

MANIFEST_FILE = "run_state.json"


class RunState(BaseModel):
    """Progress at the last finished domain."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format_version: Literal[1] = 1
    domains_done: int = 0
    """Domains learned, evaluated and exported."""
    global_step: int = 0
    """Optimizer steps over all domains."""
    tokens_seen: int = 0
    """Tokens trained on over all domains and ranks."""
    wall_seconds: float = 0.0
    """Time spent, all parts of the run together."""
    loss_matrix: list[list[float]] = []
    """Rows of the loss matrix so far; row 0 is before training."""

    def write(self, folder: Path) -> None:
        """Write atomically."""
        partial = folder / f"{MANIFEST_FILE}.partial"
        with partial.open("w", encoding="utf-8") as file:
            file.write(self.model_dump_json(indent=2))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, folder / MANIFEST_FILE)


def read_state(folder: Path) -> RunState:
    """State of the run in `folder`; the initial state where nothing has been finished.

    Raises:
        RunFolderError: the file is damaged or of another version.
    """
    path = folder / MANIFEST_FILE
    if not path.exists():
        return RunState()
    try:
        return RunState.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "file"
        raise RunFolderError(f"{path}: damaged or of another version: {place}: {first['msg']}") from error
