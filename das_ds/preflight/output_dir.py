"""Whether the output folder is the run's own, takes what all ranks write, is one and the same, and has room."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path

from das_ds.config import RunConfig
from das_ds.errors import PreflightError
from das_ds.preflight.checks import Checklist, CheckWarning, readable
from das_ds.preflight.memory_estimate import Granularity, ModelSize, checkpoint_bytes, domain_bytes, importance_bytes
from das_ds.preflight.method_memory import kept_in_checkpoint
from das_ds.preflight.peers import PeerCheck
from das_ds.run_dir import PROBE, holds_same_run
from das_ds.storage import sync
from das_ds.training.run_lock import current_holder

VISIBLE_WITHIN_S = 10.0
"""Network file systems may show other nodes' files a little later."""


def check_folder(checks: Checklist, config: RunConfig, peers: PeerCheck) -> bool:
    """Three checks; gives whether the folder can be used."""
    root, rank = config.output_dir, peers.ranks.info.rank
    expected = f"{root} to be new, empty or that of the same run"
    is_own = checks.run("folder", expected, lambda: _look_whose(config, rank), lambda found: found[0])
    expected = f"folders and files that every rank can make, flush and rename in {root}"
    can_write = checks.run(
        "writing", expected, lambda: _try_writing(root, rank), lambda _: "every rank writes and renames"
    )
    if can_write is None:
        checks.skip("sharing", "one folder, seen by all ranks", needs=("writing",))
        return False
    check_sharing(checks, root, peers)
    return is_own is not None


def check_sharing(checks: Checklist, root: Path, peers: PeerCheck) -> None:
    """A file of every rank, looked for by all."""
    token = peers.gather(secrets.token_hex(8))[0]
    files = [root / f"{PROBE}{token}-{rank}" for rank in range(peers.ranks.info.world_size)]

    def look() -> list[int]:
        own = files[peers.ranks.info.rank]
        try:
            with suppress(OSError):
                own.write_text("", encoding="utf-8")
                sync(own)
            peers.barrier()
            missing = _missing(files)
            peers.barrier()
            return missing
        finally:
            own.unlink(missing_ok=True)

    def check_loss(missing: list[list[int]]) -> str:
        blind = next((rank for rank, others in enumerate(missing) if others), None)
        if blind is not None:
            raise PreflightError(
                f"rank {blind} does not see the file of rank {missing[blind][0]} after {VISIBLE_WITHIN_S:g} s; "
                "output_dir has to be on a file system that all nodes share"
            )
        return "all ranks see each other's files"

    checks.run("sharing", "one folder, seen by all ranks", look, check_loss)


def check_disk(checks: Checklist, config: RunConfig, size: ModelSize, granularity: Granularity | None) -> None:
    """Free space against all that the run is going to write there, less what it has written already."""
    root, keep, num_domains = config.output_dir, config.checkpoint.keep_last, len(config.stages)
    one = checkpoint_bytes(
        trained=size.trained, optimizer=config.train.optimizer, granularity=granularity, num_units=size.num_units
    ) + kept_in_checkpoint(config, size, in_domain=True)
    domain = domain_bytes(size, granularity) + kept_in_checkpoint(config, size, in_domain=False)
    run_importance = 2 * importance_bytes(granularity, trained=size.trained, num_units=size.num_units)
    needed = (keep + 1) * one + num_domains * domain + run_importance
    expected = (
        f"{readable(needed)} = {keep + 1} checkpoints of {readable(one)} (checkpoint.keep_last {keep}, and one in the "
        f"making) + {num_domains} domains of {readable(domain)} + importance {readable(run_importance)}"
    )

    def check_loss(found: list[tuple[int, int]]) -> str:
        free, present = min(free for free, _ in found), min(found[0][1], needed)
        what = f"{readable(free)} free, {readable(present)} written already"
        if free < needed - present:
            raise PreflightError(
                f"{what}; make room for {readable(needed - present - free)} or lower checkpoint.keep_last"
            )
        return f"{what}, of {expected}"

    checks.run("disk", expected, lambda: (shutil.disk_usage(root).free, _written(root)), check_loss)


def _look_whose(config: RunConfig, rank: int) -> str | CheckWarning:
    root = config.output_dir
    # Only one rank: the others' probes would make the folder seem to be somebody else's.
    if rank != 0 or not root.is_dir():
        return f"{root} is new"
    for left_over in root.glob(f"{PROBE}*"):
        _remove(left_over)
    if not any(root.iterdir()):
        return f"{root} is empty"
    is_continued = holds_same_run(config)
    # No failure: an earlier run may still train while the next one is prepared.
    if (holder := current_holder(root)) is not None:
        return CheckWarning(f"{root} is held by another start, {holder}; train is refused until it ends")
    if is_continued:
        return f"{root} holds this run, which is continued"
    return f"{root} holds no training yet, which begins there"


def _try_writing(root: Path, rank: int) -> None:
    """A folder with a file, flushed and renamed, as checkpoints are."""
    root.mkdir(parents=True, exist_ok=True)
    partial = root / f"{PROBE}{secrets.token_hex(8)}-{rank}"
    whole = partial.with_name(partial.name + ".whole")
    try:
        partial.mkdir()
        (partial / "file").write_bytes(b"das_ds")
        sync(partial / "file")
        os.replace(partial, whole)
        sync(root)
        if (whole / "file").read_bytes() != b"das_ds":
            raise PreflightError(f"{whole / 'file'}: what was written there does not come back")
    finally:
        _remove(partial)
        _remove(whole)


def _missing(files: list[Path]) -> list[int]:
    """Ranks whose file cannot be opened, given time to appear."""
    deadline = time.monotonic() + VISIBLE_WITHIN_S
    while True:
        missing = [rank for rank, path in enumerate(files) if not path.exists()]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.2)


def _remove(probe: Path) -> None:
    if probe.is_dir():
        shutil.rmtree(probe, ignore_errors=True)
    else:
        probe.unlink(missing_ok=True)


def _written(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
