"""Manifest of a checkpoint: the state of the run, and the checkpoint's files with sizes and checksums.

Why not `torch.distributed.checkpoint`, whose words (Stateful, staging) are used here: it reshards DTensors, and ZeRO's
flat fp32 partitions are none; DeepSpeed's Universal Checkpoint is converted offline and pickled.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from das_ds.errors import CheckpointError
from das_ds.storage import Section, read_json_with_checksum, write_json_with_checksum

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION: Literal[3] = 3

Phase = Literal["head_warmup", "evaluate", "before", "train", "after", "finished"]
"""Training a fresh LM head alone; evaluating all corpora; preparing a domain; its optimizer steps; its importance and
export; nothing left."""


EndReason = Literal["steps", "early_stopping", "max_forgetting"]
"""Why the training of a domain ended: after all of its steps, or before."""


class DomainEvaluation(Section):
    """Held-out losses at one step of a domain (`evaluation.every_steps`)."""

    domain: str
    """Name of the stage."""
    step: int
    """Optimizer steps of the domain taken so far; 0: the domain begins."""
    global_step: int
    """Optimizer steps over all domains."""
    losses: dict[str, float]
    """Corpus -> loss in nats per predicted token: the domain itself, all earlier ones, the general corpus."""


class DomainEnd(Section):
    """How the training of a domain ended, and with which of its models the run goes on (`evaluation.every_steps`)."""

    domain: str
    """Name of the stage."""
    reason: EndReason
    """Why the training ended."""
    step: int
    """Last optimizer step of the domain."""
    best_step: int | None
    """Evaluated step with the lowest held-out loss of the domain itself; null: none kept the limits on forgetting."""
    model_step: int
    """Step whose model the run goes on with; 0: the one that the domain began with."""


class RunState(Section):
    """Progress of a run."""

    domains_done: int = 0
    """Domains, or stages of several domains, trained on and exported; the phase `evaluate` follows each of them."""
    phase: Phase = "evaluate"
    within_phase: bool = False
    """Whether batches of the phase are done that are no optimizer steps: of an importance pass or an evaluation."""
    domain_step: int = 0
    """Optimizer steps of the current domain."""
    global_step: int = 0
    """Optimizer steps over all domains."""
    tokens_seen: int = 0
    """Tokens trained on over all domains and ranks."""
    wall_seconds: float = 0.0
    """Time spent in all starts of the run together."""
    loss_matrix: list[list[float | None]] = Field(default_factory=list)
    """Rows of the loss matrix so far; row 0 is before training. None: not measured, as for a model of an earlier run
    whose checkpoint was removed before a corpus was added."""
    evaluations: list[DomainEvaluation] = Field(default_factory=list)
    """Evaluations within domains, of all domains so far."""
    ends: list[DomainEnd] = Field(default_factory=list)
    """How the domains so far ended."""
    base_divergences: list[float | None] = Field(default_factory=list)
    """KL(base || model) on each stage's held-out text, right after it was learned (`evaluation.base_divergence`); null
    where an earlier run learned it, whose model or text is gone."""
    tokens_per_byte: dict[str, float] | None = None
    """Corpus -> tokens per UTF-8 byte of the evaluated text; None where losses are no code lengths."""
    weights: dict[str, Any] | None = None
    """How the network was built from files, see `reporting.results.LoadedWeights`."""

    @property
    def ends_domain(self) -> bool:
        """Whether this is the state right after a domain was learned, evaluated and exported.

        Within `before`, what is measured of the next domain comes on top.
        """
        return self.domains_done > 0 and self.phase in ("before", "finished") and not self.within_phase


@dataclass(frozen=True)
class CheckpointMetadata:
    """Facts that a manifest records in addition to the state of the run and of its components."""

    domain: str
    """Name of the current domain, part of the checkpoint's name."""
    metrics_bytes: int
    """Length of metrics.jsonl, which is truncated to it when the run continues here."""
    wandb_run_id: str | None
    world_size: int
    zero_stage: int
    versions: dict[str, str]
    """Versions of the libraries that affect the results."""


class FileRecord(Section):
    """Expected size and checksum of a file."""

    size: int
    """Bytes."""
    sha256: str


class Manifest(Section):
    """Everything of a checkpoint but its tensors."""

    format_version: Literal[3] = FORMAT_VERSION
    name: str
    """Name of the folder: number, domain, phase and step."""
    run: RunState
    world_size: int
    zero_stage: int
    metadata: dict[str, dict[str, Any]]
    """Component -> its JSON values."""
    metrics_bytes: int
    """See `CheckpointMetadata`."""
    wandb_run_id: str | None
    saved_at: str
    """Time in UTC."""
    versions: dict[str, str]
    """See `CheckpointMetadata`."""
    files: dict[str, FileRecord]

    def write(self, folder: Path) -> None:
        """Write to a folder, with a checksum of itself.

        Raises:
            OSError: the disk is full.
        """
        write_json_with_checksum(folder / MANIFEST_FILE, self.model_dump(mode="json"))


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        CheckpointError: missing, corrupt, or of another format version.
    """
    path = folder / MANIFEST_FILE
    try:
        content = read_json_with_checksum(path)
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path.name} {error}") from error
    found = content.get("format_version")
    if found != FORMAT_VERSION:
        raise CheckpointError(
            f"{path.name}: found format_version {found}, expected {FORMAT_VERSION}; another version of das_ds saved it"
        )
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join(map(str, first["loc"])) or "file"
        raise CheckpointError(f"{path.name}: {location}: {first['msg']}") from error
    if manifest.name != folder.name:
        raise CheckpointError(f"{path.name} belongs to {manifest.name}, found in {folder.name}")
    return manifest
