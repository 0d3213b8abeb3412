"""The manifest of a checkpoint: where the run stood, which files belong to it and what they must contain."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from das_ds.errors import CheckpointError
from das_ds.storage import read_json_with_checksum, write_json_with_checksum

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION: Literal[1] = 1

Phase = Literal["head_warmup", "evaluate", "before", "train", "after", "finished"]
"""Training a fresh LM head alone; evaluation of all corpora; preparing a domain; its optimizer steps; its importance
and export; nothing left."""


class Section(BaseModel):
    """A group of values: frozen, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class RunState(Section):
    """Where a run stands."""

    domains_done: int = 0
    """Domains, or stages of several domains, trained on and exported; the phase `evaluate` comes right after one is."""
    phase: Phase = "evaluate"
    domain_step: int = 0
    """Optimizer steps of the present domain."""
    global_step: int = 0
    """Optimizer steps over all domains."""
    tokens_seen: int = 0
    """Tokens trained on over all domains and ranks."""
    wall_seconds: float = 0.0
    """Time spent, all parts of the run together."""
    loss_matrix: list[list[float]] = []
    """Rows of the loss matrix so far; row 0 is before training."""
    weights: dict[str, Any] | None = None
    """What was done with the files that the network was read from, see `reporting.results.LoadedWeights`."""

    @property
    def ends_domain(self) -> bool:
        """Whether this is the state right after a domain was learned, evaluated and exported."""
        return self.domains_done > 0 and self.phase in ("before", "finished")


class FileRecord(Section):
    """What a file must be."""

    size: int
    """Bytes."""
    sha256: str


class Manifest(Section):
    """All of a checkpoint but its tensors."""

    format_version: Literal[1] = FORMAT_VERSION
    name: str
    """Name of the folder: number, domain, phase and step."""
    run: RunState
    world_size: int
    zero_stage: int
    numbers: dict[str, dict[str, Any]]
    """Part of the program -> its state that JSON can hold."""
    metrics_bytes: int
    """Length of metrics.jsonl; what was written later is cut off when the run continues here."""
    wandb_run_id: str | None
    saved_at: str
    """Time in UTC."""
    versions: dict[str, str]
    """Versions of the libraries that decide the numbers."""
    files: dict[str, FileRecord]

    def write(self, folder: Path) -> None:
        """Write to a folder, with a checksum of itself.

        Raises:
            OSError: the disk is full.
        """
        write_json_with_checksum(folder / MANIFEST_FILE, self.model_dump(mode="json"))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: missing, altered, or of another version.
    """
    path = folder / MANIFEST_FILE
    try:
        content = read_json_with_checksum(path)
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path.name} {error}") from error
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "file"
        raise CheckpointError(f"{path.name} is of another version: {place}: {first['msg']}") from error
    if manifest.name != folder.name:
        raise CheckpointError(f"{path.name} belongs to {manifest.name}, found in {folder.name}")
    return manifest
