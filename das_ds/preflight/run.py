"""The preflight command: all checks in order."""

from __future__ import annotations

import json
from dataclasses import asdict

from das_ds.config import RunConfig
from das_ds.config.deepspeed import EngineConfig
from das_ds.errors import PreflightError
from das_ds.preflight.checks import Checklist, CheckResult
from das_ds.preflight.corpora import check_corpora
from das_ds.preflight.earlier import check_earlier_run
from das_ds.preflight.environment import (
    check_clocks,
    check_hub,
    check_method_files,
    check_network,
    check_settings,
    check_tracking,
    check_versions,
)
from das_ds.preflight.memory import check_memory, check_model
from das_ds.preflight.output_dir import check_disk, check_folder
from das_ds.preflight.peers import PeerCheck
from das_ds.preflight.rehearsal import describe_estimate, time_run
from das_ds.preflight.timings import TimeEstimate
from das_ds.training.revisions import with_recorded_revisions


def run_preflight(
    config: RunConfig, peers: PeerCheck, *, as_json: bool, estimates_time: bool = False
) -> list[CheckResult]:
    """Run all checks; rank 0 prints one line each, or one JSON object at the end.

    Args:
        config: of the run.
        peers: the ranks.
        as_json: whether to print JSON.
        estimates_time: whether to rehearse the run, see `time_run`; without it no engine is built.

    Raises:
        PreflightError: at least one check failed; raised after all were run.
    """
    info = peers.ranks.info

    def show(result: CheckResult) -> None:
        if info.is_main and not as_json:
            print(result.line(), flush=True)

    checks = Checklist(peers, show)
    check_network(checks, peers)
    check_clocks(checks, peers)
    check_versions(checks, config)
    check_tracking(checks, config, info.rank)
    check_hub(checks, config, info.rank)
    engine = check_settings(checks, config, info.world_size)
    check_method_files(checks, config)
    if config.continue_from is not None:
        check_earlier_run(checks, config)
    is_usable = check_folder(checks, config, peers)
    # A run that is resumed keeps the hub revisions that it recorded.
    pinned = with_recorded_revisions(config) if is_usable else config
    size = check_model(checks, pinned)
    check_corpora(checks, pinned)
    if size is not None and is_usable:
        check_disk(checks, config, size, info.world_size)
    else:
        checks.skip("disk", "room for all checkpoints and models", needs=("folder", "writing", "model"))
    if size is not None and engine is not None:
        check_memory(checks, config, info, size, engine)
    else:
        checks.skip("memory", "a model that fits", needs=("settings", "model"))
    if estimates_time:
        _check_time(checks, config, peers, engine, shows_summary=info.is_main and not as_json)
    if info.is_main and as_json:
        print(json.dumps({"ok": not checks.failed, "checks": [asdict(result) for result in checks.results]}))
    if checks.failed:
        number = "1 check" if len(checks.failed) == 1 else f"{len(checks.failed)} checks"
        raise PreflightError(f"preflight: {number} failed: {', '.join(checks.failed)}")
    return checks.results


def _check_time(
    checks: Checklist, config: RunConfig, peers: PeerCheck, engine: EngineConfig | None, *, shows_summary: bool
) -> None:
    """Rehearse the run: only where nothing failed, as what failed would end the rehearsal too."""
    expected = "a run whose first steps, batches and exports succeed"
    if checks.failed or engine is None:
        checks.skip("time", expected, needs=tuple(checks.failed))
        return

    def probe() -> TimeEstimate:
        summary, estimate = time_run(config, engine, peers.ranks)
        if shows_summary:
            print("\n".join(summary.lines()), flush=True)
        return estimate

    info = peers.ranks.info
    checks.run(
        "time", expected, probe, lambda estimates: describe_estimate(estimates[0], info.world_size, info.device.type)
    )
