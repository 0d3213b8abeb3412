"""Whether all ranks see each other, at the same time of day, with the same programs and config."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import das_ds
from das_ds.config import RunConfig
from das_ds.config.deepspeed import build_deepspeed_config
from das_ds.config.io import config_values
from das_ds.engine.loss_scaler import check_precision, emulated_precision_warning
from das_ds.errors import PreflightError
from das_ds.preflight.checks import Checklist
from das_ds.preflight.peers import LinkSpeed, PeerCheck
from das_ds.versions import library_versions

LARGEST_SKEW_S = 5.0
MOST_SHOWN = 3


def check_network(checks: Checklist, peers: PeerCheck) -> None:
    """A sum over all ranks on the run's backend, right and how fast."""
    num_ranks = peers.ranks.info.world_size

    def check_loss(links: list[LinkSpeed]) -> str:
        slowest, narrowest = max(link.latency_s for link in links), min(link.bytes_per_s for link in links)
        backend = links[0].backend
        if num_ranks == 1:
            return f"one rank ({backend}), so there is nobody to talk to"
        return (
            f"{num_ranks} ranks over {backend}: all-reduce {slowest * 1e3:.3f} ms for one number, "
            f"{narrowest / 1e9:.2f} GB/s for 64 MiB"
        )

    checks.run("network", f"the sum of 1 to {num_ranks} on every rank", peers.measure_bandwidth, check_loss)


def check_clocks(checks: Checklist, peers: PeerCheck, clock: Callable[[], float] = time.time) -> None:
    """Clocks of all ranks, read right after they waited for each other."""

    def look() -> float:
        peers.barrier()
        return clock()

    def check_loss(times: list[float]) -> str:
        skew = max(times) - min(times)
        if skew > LARGEST_SKEW_S:
            late, early = times.index(max(times)), times.index(min(times))
            raise PreflightError(f"rank {late} is {skew:.1f} s ahead of rank {early}; set the nodes' clocks (NTP)")
        return f"clocks differ by {skew:.3f} s"

    checks.run("clocks", f"at most {LARGEST_SKEW_S:g} s of difference", look, check_loss)


def check_versions(
    checks: Checklist, config: RunConfig, versions: Callable[[], dict[str, str]] = library_versions
) -> None:
    """Libraries, das_ds itself and the run config, compared with rank 0's."""

    def look() -> dict[str, str]:
        code = {"code of das_ds": _code_checksum(Path(das_ds.__file__).parent)}
        return versions() | code | {f"config {key}": value for key, value in config_values(config).items()}

    def check_loss(found: list[dict[str, str]]) -> str:
        differing = [
            f"{name}: {other.get(name, 'none')} on rank {rank}, {found[0].get(name, 'none')} on rank 0"
            for rank, other in enumerate(found)
            for name in dict.fromkeys([*found[0], *other])
            if other.get(name) != found[0].get(name)
        ]
        if differing:
            more = f"; and {len(differing) - MOST_SHOWN} more" if len(differing) > MOST_SHOWN else ""
            raise PreflightError("; ".join(differing[:MOST_SHOWN]) + more)
        return "; ".join(f"{name} {found[0][name]}" for name in ("python", "torch", "deepspeed", "transformers"))

    checks.run("versions", "the same libraries, das_ds and config on all ranks", look, check_loss)


def check_settings(checks: Checklist, config: RunConfig, num_ranks: int) -> dict[str, Any] | None:
    """Batch sizes, ZeRO and precision at this number of ranks; gives the merged DeepSpeed config."""
    train = config.train

    def look() -> dict[str, Any]:
        check_precision(train.precision)
        return build_deepspeed_config(config, num_ranks)

    def check_loss(found: list[dict[str, Any]]) -> str:
        differing = next((rank for rank, other in enumerate(found) if other != found[0]), None)
        if differing is not None:
            raise PreflightError(f"rank {differing} reads another DeepSpeed file than rank 0")
        slow = emulated_precision_warning(train.precision)
        return (
            f"{train.precision}{slow and f' ({slow})'}, "
            f"ZeRO {found[0].get('zero_optimization', {}).get('stage', 0)}, "
            f"{train.global_batch_size} sequences = {num_ranks} ranks x {train.micro_batch_size} x "
            f"{found[0]['gradient_accumulation_steps']} micro-steps"
        )

    found = checks.run("settings", "batch sizes, ZeRO settings and precision that fit together", look, check_loss)
    return None if found is None else found[0]


def _code_checksum(folder: Path) -> str:
    """Of every Python file of the package: two checkouts may have the same version."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
