"""Preflight checks on one process without a process group, and on real ranks of which one is not like the other."""

from __future__ import annotations

import errno
import os
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from das_ds.config import RunConfig
from das_ds.distributed.process_group import RankInfo
from das_ds.errors import PreflightError
from das_ds.preflight import output_dir as folder
from das_ds.preflight import rehearsal
from das_ds.preflight.checks import Checklist, CheckResult
from das_ds.preflight.corpora import check_corpora
from das_ds.preflight.environment import check_clocks, check_network, check_settings, check_versions
from das_ds.preflight.output_dir import check_folder, check_sharing
from das_ds.preflight.peers import PeerCheck
from das_ds.preflight.rehearsal import RehearsalTrainer
from das_ds.preflight.run import run_preflight
from das_ds.preflight.timings import Rehearsal
from das_ds.versions import library_versions

TIMEOUT = timedelta(seconds=60)


class Alone:
    """The only rank."""

    def __init__(self) -> None:
        self.ranks = SimpleNamespace(info=RankInfo(0, 0, 1, torch.device("cpu")))

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None:
        pass


CHECKS = [
    "network",
    "clocks",
    "versions",
    "tracking",
    "settings",
    "method",
    "folder",
    "writing",
    "sharing",
    "model",
    "corpora",
    "disk",
    "memory",
]


def silent_checks(peers: Any) -> Checklist:
    """Checks that print nothing."""
    return Checklist(peers, lambda finding: None)


def preflight(values: dict[str, Any]) -> list[CheckResult]:
    """All checks of a config on these ranks, none of which fails."""
    return run_preflight(RunConfig(**values), PeerCheck(TIMEOUT), as_json=False)


def different_ranks(values: dict[str, Any]) -> list[CheckResult]:
    """Rank 1 has another clock, library, config, DeepSpeed file, corpus and folder than rank 0."""
    peers = PeerCheck(TIMEOUT)
    checks = silent_checks(peers)
    rank = peers.ranks.info.rank
    config = RunConfig(**values)
    check_clocks(checks, peers, lambda: time.time() + 60.0 * rank)
    check_versions(checks, config, lambda: library_versions() | ({"torch": "9.9"} if rank else {}))
    check_versions(checks, config.model_copy(update={"seed": rank}))
    engine = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000 + rank}}
    check_settings(checks, config.model_copy(update={"deepspeed": engine}), peers.ranks.info.world_size)
    one = config.domains[0]
    other = config.domains[1]
    check_corpora(checks, config.model_copy(update={"domains": [other if rank else one]}))
    folder.VISIBLE_WITHIN_S = 0.1
    own = config.output_dir / str(rank)
    own.mkdir(parents=True)
    check_sharing(checks, own, peers)
    assert not list(own.iterdir())
    return checks.results


def failing_rank(values: dict[str, Any]) -> list[CheckResult]:
    """Rank 1 cannot rename, and its sums are wrong; then no rank can talk over the run's backend at all."""
    peers = PeerCheck(TIMEOUT)
    checks = silent_checks(peers)
    rank = peers.ranks.info.rank
    config = RunConfig(**values)
    rename = os.replace
    all_reduce = dist.all_reduce

    def cannot_rename(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(source))

    def wrong_sum(tensor: torch.Tensor, **options: Any) -> Any:
        work = all_reduce(tensor, **options)
        work.wait()
        tensor += 1.0
        return work

    def broken(tensor: torch.Tensor, **options: Any) -> Any:
        raise RuntimeError("no route to host\nframe #0")

    try:
        if rank == 1:
            os.replace = cannot_rename
            dist.all_reduce = wrong_sum
        check_folder(checks, config, peers)
        check_network(checks, peers)
        dist.all_reduce = broken
        check_network(checks, peers)
    finally:
        os.replace = rename
        dist.all_reduce = all_reduce
    return checks.results


def rank_without_backend(timeout: float) -> list[CheckResult]:
    """Rank 1 cannot talk over the run's backend, so rank 0 waits for it there in vain."""
    peers = PeerCheck(timedelta(seconds=timeout))
    checks = silent_checks(peers)
    all_reduce = dist.all_reduce

    def broken(tensor: torch.Tensor, **options: Any) -> Any:
        raise RuntimeError("no route to host")

    try:
        if peers.ranks.info.rank == 1:
            dist.all_reduce = broken
        check_network(checks, peers)
    finally:
        dist.all_reduce = all_reduce
    return checks.results


def preflight_and_error(values: dict[str, Any]) -> str:
    """What `run_preflight` raises on this rank."""
    try:
        preflight(values)
    except PreflightError as error:
        return str(error)
    return ""


def equal_on_all(findings: list[list[CheckResult]]) -> list[CheckResult]:
    """What all ranks found, which is the same."""
    assert findings[0] == findings[1]
    return findings[0]


def rehearsed(values: dict[str, Any]) -> tuple[CheckResult, Rehearsal]:
    """The result of the check of time, and what it measured."""
    made: list[RehearsalTrainer] = []

    class SeenTrainer(RehearsalTrainer):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    rehearsal.RehearsalTrainer = SeenTrainer  # type: ignore[misc]
    try:
        results = run_preflight(RunConfig(**values), PeerCheck(TIMEOUT), as_json=False, estimates_time=True)
    finally:
        rehearsal.RehearsalTrainer = RehearsalTrainer  # type: ignore[misc]
    return results[-1], made[0].rehearsal
