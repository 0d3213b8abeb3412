"""Preflight checks of the output folder: whose it is, whether all ranks can write to it and share it, free space."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path

from das_ds.config import RunConfig
from das_ds.errors import PreflightError
from das_ds.models.size import ModelSize
from das_ds.preflight.checks import Checklist, CheckWarning, format_bytes
from das_ds.preflight.memory import disk_use
from das_ds.preflight.peers import PeerCheck
from das_ds.run_dir import PROBE, holds_same_run
from das_ds.storage import sync
from das_ds.training.run_lock import current_holder

VISIBLE_WITHIN_S = 10.0
"""Network file systems may show files of other nodes with a delay."""


def check_folder(checks: Checklist, config: RunConfig, peers: PeerCheck) -> bool:
    """Three checks: owner, writing and sharing.

    Returns:
        Whether the run can use the folder.
    """
    root = config.output_dir
    rank = peers.ranks.info.rank
    expected = f"{root} to be new, empty or that of the same run"
    is_usable = checks.run("folder", expected, lambda: _describe_owner(config, rank), lambda found: found[0])
    expected = f"folders and files that every rank can create, flush and rename in {root}"
    can_write = checks.run(
        "writing", expected, lambda: _try_writing(root, rank), lambda _: "every rank writes and renames"
    )
    if can_write is None:
        checks.skip("sharing", "one folder, seen by all ranks", needs=("writing",))
        return False
    check_sharing(checks, root, peers)
    return is_usable is not None


def check_sharing(checks: Checklist, root: Path, peers: PeerCheck) -> None:
    """Every rank creates a file and looks for those of all others."""
    token = peers.gather(secrets.token_hex(8))[0]
    files = [root / f"{PROBE}{token}-{rank}" for rank in range(peers.ranks.info.world_size)]

    def probe() -> list[int]:
        own_file = files[peers.ranks.info.rank]
        try:
            # A rank that cannot write shows up as a missing file.
            with suppress(OSError):
                own_file.write_text("", encoding="utf-8")
                sync(own_file)
            peers.barrier()
            missing = _find_missing(files)
            # No rank removes its file while another still looks for it.
            peers.barrier()
            return missing
        finally:
            own_file.unlink(missing_ok=True)

    def summarize(missing: list[list[int]]) -> str:
        observer = next((rank for rank, others in enumerate(missing) if others), None)
        if observer is not None:
            raise PreflightError(
                f"rank {observer} does not see the file of rank {missing[observer][0]} after {VISIBLE_WITHIN_S:g} s; "
                "output_dir must be on a file system that all nodes share"
            )
        return "all ranks see each other's files"

    checks.run("sharing", "one folder, seen by all ranks", probe, summarize)


def check_disk(checks: Checklist, config: RunConfig, size: ModelSize, num_ranks: int) -> None:
    """Free space, compared with the files that the run still has to write on so many ranks."""
    root = config.output_dir
    use = disk_use(config, size, num_ranks)
    needed = use.total
    expected = (
        f"{format_bytes(needed)} = {use.num_checkpoints} checkpoints of {format_bytes(use.checkpoint)} "
        f"(checkpoint.keep_last {config.checkpoint.keep_last}, and one being written) + {use.num_domains} domains of "
        f"{format_bytes(use.domain)} + files of the method {format_bytes(use.run)}"
    )

    def summarize(found: list[tuple[int, int]]) -> str:
        free = min(free for free, _ in found)
        present = min(found[0][1], needed)
        what = f"{format_bytes(free)} free, {format_bytes(present)} written already"
        if free < needed - present:
            raise PreflightError(
                f"{what}; make room for {format_bytes(needed - present - free)} or lower checkpoint.keep_last"
            )
        return f"{what}, of {expected}"

    checks.run("disk", expected, lambda: (shutil.disk_usage(root).free, _num_bytes_written(root)), summarize)


def _describe_owner(config: RunConfig, rank: int) -> str | CheckWarning:
    root = config.output_dir
    # Only rank 0 looks: a slower rank would see probe files that the next check leaves.
    if rank != 0 or not root.is_dir():
        return f"{root} is new"
    # A preflight that was killed leaves its files behind.
    for leftover in root.glob(f"{PROBE}*"):
        _remove(leftover)
    if not any(root.iterdir()):
        return f"{root} is empty"
    is_resumed = holds_same_run(config)
    # Only a warning: an earlier start may still train while the next one is prepared.
    if (holder := current_holder(root)) is not None:
        return CheckWarning(f"{root} is held by another start, {holder}; training is refused until it ends")
    if is_resumed:
        return f"{root} contains this run, which will be resumed"
    return f"{root} contains no training yet, so the run starts there"


def _try_writing(root: Path, rank: int) -> None:
    """Create a folder with a file, flush and rename it, as for checkpoints."""
    root.mkdir(parents=True, exist_ok=True)
    partial = root / f"{PROBE}{secrets.token_hex(8)}-{rank}"
    complete = partial.with_name(partial.name + ".complete")
    try:
        partial.mkdir()
        (partial / "file").write_bytes(b"das_ds")
        sync(partial / "file")
        os.replace(partial, complete)
        sync(root)
        if (complete / "file").read_bytes() != b"das_ds":
            raise PreflightError(f"{complete / 'file'}: read back different bytes than were written")
    finally:
        _remove(partial)
        _remove(complete)


def _find_missing(files: list[Path]) -> list[int]:
    """Ranks whose file does not appear in time."""
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


def _num_bytes_written(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
