"""Preflight checks of the ranks' environment: network, clocks, versions, metrics, and settings."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import das_ds
from das_ds.config import RunConfig
from das_ds.config.deepspeed import EngineConfig, build_engine_config
from das_ds.config.io import config_values
from das_ds.engine.loss_scaler import check_precision, emulated_precision_warning
from das_ds.errors import PreflightError
from das_ds.methods import method_class
from das_ds.preflight.checks import Checklist, CheckWarning
from das_ds.preflight.peers import LinkSpeed, PeerCheck
from das_ds.tracking.libraries import import_libraries
from das_ds.training.hub_upload import check_hub_names, find_account, hub_target
from das_ds.versions import library_versions

MAX_SKEW_S = 5.0
MAX_SHOWN = 3


def check_network(checks: Checklist, peers: PeerCheck) -> None:
    """All-reduces over all ranks on the run's backend: whether the sum is right, and how fast."""
    num_ranks = peers.ranks.info.world_size

    def summarize(links: list[LinkSpeed]) -> str:
        backend = links[0].backend
        if num_ranks == 1:
            return f"single rank ({backend}), nothing to measure"
        latency = max(link.latency_s for link in links)
        bandwidth = min(link.bytes_per_s for link in links)
        return (
            f"{num_ranks} ranks over {backend}: all-reduce {latency * 1e3:.3f} ms for one number, "
            f"{bandwidth / 1e9:.2f} GB/s for 64 MiB"
        )

    checks.run("network", f"the sum of 1 to {num_ranks} on every rank", peers.measure_bandwidth, summarize)


def check_clocks(checks: Checklist, peers: PeerCheck, clock: Callable[[], float] = time.time) -> None:
    """Clocks of all ranks, read right after a barrier."""

    def probe() -> float:
        peers.barrier()
        return clock()

    def summarize(times: list[float]) -> str:
        skew = max(times) - min(times)
        if skew > MAX_SKEW_S:
            ahead = times.index(max(times))
            behind = times.index(min(times))
            raise PreflightError(f"rank {ahead} is {skew:.1f} s ahead of rank {behind}; set the nodes' clocks (NTP)")
        return f"clocks differ by {skew:.3f} s"

    checks.run("clocks", f"at most {MAX_SKEW_S:g} s of difference", probe, summarize)


def check_versions(
    checks: Checklist, config: RunConfig, versions: Callable[[], dict[str, str]] = library_versions
) -> None:
    """Libraries, the code of das_ds and the run config, compared with those of rank 0."""

    def probe() -> dict[str, str]:
        code = {"code of das_ds": _code_checksum(Path(das_ds.__file__).parent)}
        return versions() | code | {f"config {key}": value for key, value in config_values(config).items()}

    def summarize(versions_by_rank: list[dict[str, str]]) -> str:
        expected = versions_by_rank[0]
        differing = [
            f"{name}: {found.get(name, 'none')} on rank {rank}, {expected.get(name, 'none')} on rank 0"
            for rank, found in enumerate(versions_by_rank)
            for name in dict.fromkeys([*expected, *found])
            if found.get(name) != expected.get(name)
        ]
        if differing:
            more = f"; and {len(differing) - MAX_SHOWN} more" if len(differing) > MAX_SHOWN else ""
            raise PreflightError("; ".join(differing[:MAX_SHOWN]) + more)
        return "; ".join(f"{name} {expected[name]}" for name in ("python", "torch", "deepspeed", "transformers"))

    checks.run("versions", "the same libraries, das_ds and config on all ranks", probe, summarize)


def check_tracking(checks: Checklist, config: RunConfig, rank: int) -> None:
    """Libraries that get the metrics, which only rank 0 needs."""

    def probe() -> str:
        modules = import_libraries(config) if rank == 0 else {}
        missing = " (wandb is not installed, which wandb.mode auto allows)" if None in modules.values() else ""
        return ", ".join(["metrics.jsonl", *(name for name, module in modules.items() if module)]) + missing

    checks.run("tracking", "all libraries in tracking to be installed", probe, lambda found: found[0])


def check_hub(checks: Checklist, config: RunConfig, rank: int) -> None:
    """Names and token for uploads of models, which only rank 0 needs; nothing where none are uploaded."""
    if not config.export.push_to_hub:
        return

    def probe() -> str | None:
        check_hub_names(config)
        return find_account(config) if rank == 0 else None

    def summarize(accounts: list[str | None]) -> str | CheckWarning:
        repositories = dict.fromkeys(hub_target(config, stage).repo_id for stage in config.stage_names)
        if accounts[0] is None:
            return CheckWarning("the hub does not answer; models would stay in the run folder until it does")
        return f"models go to {', '.join(repositories)} as {accounts[0]}"

    checks.run("hub", "a token that may write to the repositories of export.hub_model_id", probe, summarize)


def check_settings(checks: Checklist, config: RunConfig, num_ranks: int) -> EngineConfig | None:
    """Batch sizes, ZeRO stage and precision at this number of ranks.

    Returns:
        DeepSpeed's merged settings; None if the check failed.
    """
    train = config.train

    def probe() -> EngineConfig:
        check_precision(train.precision)
        return build_engine_config(config, num_ranks)

    def summarize(configs: list[EngineConfig]) -> str:
        differing = next((rank for rank, other in enumerate(configs) if other != configs[0]), None)
        if differing is not None:
            raise PreflightError(f"rank {differing} reads another DeepSpeed file than rank 0")
        warning = emulated_precision_warning(train.precision)
        precision = f"{train.precision} ({warning})" if warning else train.precision
        return (
            f"{precision}, ZeRO {configs[0].zero_stage}, "
            f"{train.global_batch_size} sequences = {num_ranks} ranks x {train.micro_batch_size} x "
            f"{configs[0].raw['gradient_accumulation_steps']} micro-steps"
        )

    configs = checks.run("settings", "batch sizes, ZeRO settings and precision that fit together", probe, summarize)
    return None if configs is None else configs[0]


def check_method_files(checks: Checklist, config: RunConfig) -> None:
    """Files that the method's settings name, such as `init_from`, on every rank; a network is not built."""

    def probe() -> str:
        # A run that continues another one has in its state what they held.
        if config.continue_from is None:
            method_class(config.method).check_files(config)
        return config.method.name

    checks.run("method", "files of the section `method` that can be read", probe, lambda names: names[0])


def _code_checksum(folder: Path) -> str:
    """Checksum of every Python file of the package, because two checkouts may have the same version."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
