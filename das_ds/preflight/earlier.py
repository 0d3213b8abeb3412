"""Preflight check of the run that a run continues, before GPUs are taken for it."""

from __future__ import annotations

from das_ds.checkpoint.store import CheckpointStore
from das_ds.config import RunConfig
from das_ds.errors import PreflightError
from das_ds.preflight.checks import Checklist
from das_ds.run_dir import RunDir
from das_ds.training.earlier_run import find_earlier_run


def check_earlier_run(checks: Checklist, config: RunConfig) -> None:
    """The run that a run continues: its settings and checkpoints, on every rank, until the run has its own.

    Checksums, for which all files are read, are left to the start of the run.
    """

    def probe() -> str:
        if CheckpointStore(RunDir(config.output_dir).checkpoints_dir, keep=1).names():
            return "not needed any more: the run has checkpoints of its own"
        earlier = find_earlier_run(config)
        summary = f"{earlier.folder} after {earlier.after}: {earlier.ends[earlier.num_learned].manifest.name}"
        gone = [config.domains[row - 1].name for row in range(1, earlier.num_learned) if row not in earlier.ends]
        if gone:
            summary += f"; new corpora have no loss after {', '.join(gone)}, whose checkpoints are gone"
        return summary

    def summarize(found: list[str]) -> str:
        if len(set(found)) > 1:
            raise PreflightError(f"ranks see different checkpoints: {', '.join(sorted(set(found)))}")
        return found[0]

    checks.run("earlier", "an earlier run with the same settings, and its checkpoint", probe, summarize)
