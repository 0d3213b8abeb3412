"""Status of a run, read from the files in its folder: it may be in progress, on any node, or over."""

from __future__ import annotations

import json
import math
import statistics
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from das_ds.checkpoint.manifest import Manifest, Phase, RunState, read_manifest
from das_ds.checkpoint.store import CheckpointStore
from das_ds.config import RunConfig
from das_ds.config.io import load_config
from das_ds.errors import CheckpointError, ConfigError, RunFolderError
from das_ds.progress import format_duration
from das_ds.reporting.results import Results
from das_ds.run_dir import HANG_REPORT, RunDir
from das_ds.tracking.names import DOMAIN, DOMAIN_STEP, GLOBAL_STEP, LOSS, TOKENS_PER_S, TOKENS_SEEN
from das_ds.training.run_lock import current_holder

TAIL_BYTES = 1 << 16
"""Of metrics.jsonl that are read."""
FINISHED = "finished"
STOPPED = "stopped"


@dataclass(frozen=True)
class RunStatus:
    """Where a run is."""

    folder: str
    state: str
    """`running`, `stopped`, `finished` or `not started`."""
    holder: str | None
    """Process that holds the run folder."""
    method: str
    domain: str
    """Current stage, or the last one."""
    domain_number: int
    """From 1."""
    num_domains: int
    phase: str
    step: int
    """Optimizer steps of the domain that were logged or saved."""
    num_steps: int
    total_step: int
    """Optimizer steps of all domains, without a warm-up of the head and without those of an earlier run."""
    total_steps: int
    tokens_seen: int
    seconds_left: float | None
    """Of optimizer steps, at the speed of the last logged ones; None before the first."""
    loss: float | None
    """Training loss of the last logged step; None before the first, and if it is not finite."""
    tokens_per_s: float | None
    """Median of the last logged steps."""
    logged_seconds_ago: float | None
    stage: str | None
    """Row of the loss matrix that `losses` are of: the newest evaluation; None before the first."""
    losses: dict[str, float]
    """Held-out losses by corpus."""
    checkpoint: str | None
    """Newest checkpoint with an intact manifest; its other files are not read."""
    saved_seconds_ago: float | None
    notes: list[str]
    """What else is to be known, one sentence each."""

    def lines(self) -> list[str]:
        """The status for a terminal, a line per fact."""
        holder = "" if self.holder is None else f" ({self.holder})"
        state = "stopped; the same command resumes it" if self.state == STOPPED else self.state
        place = f"domain {self.domain} ({self.domain_number} of {self.num_domains}), phase {self.phase}"
        if self.phase == "train":
            place += f", step {self.step:,} of {self.num_steps:,}"
        share = self.total_step / self.total_steps
        facts = [
            ("method", self.method),
            ("place", place),
            (
                "progress",
                f"{self.total_step:,} of {self.total_steps:,} steps ({share:.0%}), {self.tokens_seen:,} tokens",
            ),
        ]
        if self.seconds_left is not None and self.state != FINISHED:
            facts.append(("steps left", f"{format_duration(self.seconds_left)} at {self.tokens_per_s:,.0f} tokens/s"))
        if self.logged_seconds_ago is not None:
            loss = "not finite" if self.loss is None else f"{self.loss:.4f}"
            facts.append(("loss", f"{loss}, logged {format_duration(self.logged_seconds_ago)} ago"))
        if self.stage is not None:
            losses = ", ".join(f"{corpus} {loss:.4f}" for corpus, loss in self.losses.items())
            facts.append(("held-out", f"{self.stage}: {losses}"))
        if self.checkpoint is not None and self.saved_seconds_ago is not None:
            facts.append(("checkpoint", f"{self.checkpoint}, saved {format_duration(self.saved_seconds_ago)} ago"))
        facts += [("note", note) for note in self.notes]
        return [f"{self.folder}: {state}{holder}", *(f"  {name:<11}{text}" for name, text in facts)]


def read_status(root: Path) -> RunStatus:
    """The status of a run.

    Raises:
        RunFolderError: it is no run folder, or its config, results or metrics cannot be used.
        CheckpointError: it has checkpoints, but no intact manifest.
    """
    run_dir = RunDir(root)
    config = _read_config(run_dir)
    notes: list[str] = []
    manifest = _newest_manifest(CheckpointStore(run_dir.checkpoints_dir, keep=1), notes)
    results = Results.read(run_dir.results_file) if run_dir.results_file.exists() else None
    steps = _last_steps(run_dir.metrics_file)
    holder = current_holder(root)
    saved = RunState() if manifest is None else manifest.run
    # Steps since the checkpoint are known from metrics.jsonl alone.
    last = steps[-1] if steps and steps[-1].global_step > saved.global_step else None
    stages = config.stages
    num_done, phase, step = _find_place([stage.name for stage in stages], saved, last)
    # The last stage after all are done.
    index = min(num_done, len(stages) - 1)
    # Those of a run that this one continues are done.
    total_steps = sum(stage.num_steps for stage in config.own_stages)
    own_done = stages[config.num_earlier : num_done]
    total_step = sum(stage.num_steps for stage in own_done) + (step if phase in ("train", "after") else 0)
    tokens_per_s = statistics.median(step.tokens_per_s for step in steps) if steps else None
    tokens_per_step = config.train.global_batch_size * config.data.sequence_length
    if steps and manifest is None:
        # The first one is saved before the first step is logged.
        notes.append("steps were logged, but there is no checkpoint to resume from")
    if run_dir.stop_file.exists():
        notes.append("a stop is requested (file STOP)")
    if config.continue_from is not None:
        notes.append(f"the run continues {config.continue_from.in_words}")
    if reports := sorted(path.name for path in root.glob(f"{HANG_REPORT}*")):
        notes.append(f"an earlier start hung, see {', '.join(reports)}")
    return RunStatus(
        folder=str(root),
        state=_state(phase, is_held=holder is not None, is_saved=manifest is not None),
        holder=None if holder is None else str(holder),
        method=config.method.name,
        domain=stages[index].name,
        domain_number=index + 1,
        num_domains=len(stages),
        phase=phase,
        step=step,
        num_steps=stages[index].num_steps,
        total_step=total_step,
        total_steps=total_steps,
        tokens_seen=saved.tokens_seen if last is None else last.tokens_seen,
        seconds_left=(total_steps - total_step) * tokens_per_step / tokens_per_s if tokens_per_s else None,
        loss=steps[-1].loss if steps and math.isfinite(steps[-1].loss) else None,
        tokens_per_s=tokens_per_s,
        logged_seconds_ago=_seconds_since(run_dir.metrics_file.stat().st_mtime) if steps else None,
        stage=None if results is None else results.stages[-1],
        losses={} if results is None else results.last_losses,
        checkpoint=None if manifest is None else manifest.name,
        saved_seconds_ago=None
        if manifest is None
        else _seconds_since(datetime.fromisoformat(manifest.saved_at).timestamp()),
        notes=notes,
    )


@dataclass(frozen=True)
class _Step:
    """A line of metrics.jsonl."""

    domain: str
    domain_step: int
    global_step: int
    tokens_seen: int
    loss: float
    tokens_per_s: float


def _read_config(run_dir: RunDir) -> RunConfig:
    if not run_dir.config_file.exists():
        found = "no such folder" if not run_dir.root.is_dir() else f"no {run_dir.config_file.name} in it"
        raise RunFolderError(f"{run_dir.root}: found {found}, expected the folder of a run that was started")
    try:
        return load_config(run_dir.config_file)
    except ConfigError as error:
        raise RunFolderError(f"{run_dir.root}: its {run_dir.config_file.name} cannot be used: {error}") from error


def _newest_manifest(store: CheckpointStore, notes: list[str]) -> Manifest | None:
    """Of the newest checkpoint that has an intact one; None where there is no checkpoint. Adds what is damaged."""
    damaged = 0
    for name in reversed(store.names()):
        try:
            return read_manifest(store.folder / name)
        except CheckpointError as error:
            # A run in progress removes old checkpoints.
            if (store.folder / name).exists():
                damaged += 1
                notes.append(f"checkpoint {name} is damaged and will be skipped: {error}")
    if damaged:
        raise CheckpointError(
            f"{store.folder}: found no valid checkpoint, {damaged} were corrupt; restore an intact copy of one, or "
            "start over with another output_dir"
        )
    return None


def _last_steps(path: Path) -> list[_Step]:
    """The last logged steps; a line that is being written, or is damaged, is left out."""
    if not path.exists():
        return []
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be read ({error.strerror}); expected the metrics of a run") from error
    return [step for line in lines if (step := _parse_step(line)) is not None]


def _parse_step(line: bytes) -> _Step | None:
    try:
        row = json.loads(line)
        return _Step(
            str(row[DOMAIN]),
            int(row[DOMAIN_STEP]),
            int(row[GLOBAL_STEP]),
            int(row[TOKENS_SEEN]),
            float(row[LOSS]),
            float(row[TOKENS_PER_S]),
        )
    except (ValueError, TypeError, KeyError, OverflowError):
        return None


def _find_place(stages: list[str], saved: RunState, last: _Step | None) -> tuple[int, Phase, int]:
    """(stages done, phase, step in the stage) from the newest checkpoint and a step that was logged after it."""
    if last is None:
        return saved.domains_done, saved.phase, saved.domain_step
    if last.domain not in stages:
        return 0, "head_warmup", last.domain_step
    return stages.index(last.domain), "train", last.domain_step


def _state(phase: Phase, *, is_held: bool, is_saved: bool) -> str:
    if is_held:
        return "running"
    if phase == FINISHED:
        return FINISHED
    return STOPPED if is_saved else "not started"


def _seconds_since(timestamp: float) -> float:
    # Clocks of nodes differ.
    return max(0.0, time.time() - timestamp)
