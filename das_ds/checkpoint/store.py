"""Checkpoint store: publishes checkpoints of a run, prunes old ones, and finds the latest valid one on all ranks."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from das_ds.checkpoint.manifest import FileRecord, Manifest, read_manifest
from das_ds.errors import CheckpointError
from das_ds.run_dir import STAGING_PREFIX
from das_ds.storage import checksum, sync, sync_all
from das_ds.thread_guard import ThreadGuard

if TYPE_CHECKING:
    from das_ds.distributed.process_group import ProcessGroup

logger = logging.getLogger(__name__)

QUARANTINED = ".broken"
"""Ending of the names of corrupt checkpoints."""
NAME = re.compile(r"^\d{6,}_[^.]*$")


class CheckpointStore:
    """Checkpoints `<number>_<domain>_<phase>_<step>` of one run; only rank 0 changes the folder.

    Args:
        folder: for all checkpoints of the run.
        keep: newest checkpoints to keep, in addition to the one at the end of every domain.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep
        self._ends_domain: dict[str, bool] = {}
        # Removing gigabytes takes a while, for which training need not wait.
        self._remover = ThreadPoolExecutor(1)
        self._removing = ThreadGuard(
            f"{self.folder}: an old checkpoint cannot be removed, so the disk may fill; training continues"
        )

    def names(self) -> list[str]:
        """Checkpoints from the oldest to the newest, valid or not."""
        paths = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((p.name for p in paths if NAME.match(p.name)), key=lambda name: int(name.split("_")[0]))

    @property
    def has_corrupted(self) -> bool:
        """Whether a checkpoint was ever quarantined."""
        return any(self.folder.glob(f"*{QUARANTINED}"))

    @property
    def next_number(self) -> int:
        """Number of the next checkpoint; never reused, even after a rollback to an earlier checkpoint."""
        paths = self.folder.iterdir() if self.folder.is_dir() else ()
        return max((int(number[0]) for p in paths if (number := re.findall(r"^\d+", p.name))), default=-1) + 1

    def staging_dir(self, name: str) -> Path:
        """Where a checkpoint is written before it is published."""
        return self.folder / f"{STAGING_PREFIX}{name}"

    def clear_staging(self) -> None:
        """Remove the remains of unfinished checkpoints."""
        for path in self.folder.glob(f"{STAGING_PREFIX}*"):
            shutil.rmtree(path, ignore_errors=True)

    def publish(self, manifest: Manifest) -> None:
        """Make a checkpoint visible, whose files are all on disk, and remove those that are no longer kept.

        Raises:
            CheckpointError: the disk is full or the folder cannot be written.
        """
        staging_dir = self.staging_dir(manifest.name)
        try:
            manifest.write(staging_dir)
            # Synced before the rename: a checkpoint that is visible after a power loss is complete.
            sync_all(staging_dir)
            os.replace(staging_dir, self.folder / manifest.name)
            sync(self.folder)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder / manifest.name}: cannot be written ({error.strerror or error}); the previous "
                "checkpoint is intact"
            ) from error
        self._ends_domain[manifest.name] = manifest.run.ends_domain
        self._prune()

    def quarantine(self, name: str, problems: list[str]) -> None:
        """Warn about a corrupt checkpoint and rename it, so that it is never considered again."""
        logger.warning("checkpoint %s is corrupt and is skipped: %s", name, "; ".join(problems))
        os.replace(self.folder / name, self.folder / f"{name}{QUARANTINED}")

    def wait_for_removals(self) -> None:
        """Wait until checkpoints that are no longer kept are removed."""
        self._remover.submit(lambda: None).result()

    def find_problems(self, name: str, manifest: Manifest, is_checked: Callable[[int], bool]) -> list[str]:
        """Check files of a checkpoint against its manifest.

        Args:
            name: the checkpoint.
            manifest: its manifest.
            is_checked: picks files by their index in alphabetical order, so that ranks can share the work.

        Returns:
            One line per file that is missing, truncated or altered.
        """
        records = [item for index, item in enumerate(sorted(manifest.files.items())) if is_checked(index)]
        return [problem for file, record in records if (problem := _find_problem(self.folder / name / file, record))]

    def _prune(self) -> None:
        for name in self.names()[: -self._keep]:
            if not self._is_end_of_domain(name):
                # Renamed first: an interrupted removal must not leave half a checkpoint under its name.
                renamed = self.staging_dir(name)
                os.replace(self.folder / name, renamed)
                self._remover.submit(self._remove, renamed)

    def _remove(self, folder: Path) -> None:
        with self._removing:
            shutil.rmtree(folder, ignore_errors=True)
            if folder.exists():
                # Again, so that the error is raised.
                shutil.rmtree(folder)

    def _is_end_of_domain(self, name: str) -> bool:
        if name not in self._ends_domain:
            try:
                self._ends_domain[name] = read_manifest(self.folder / name).run.ends_domain
            except CheckpointError:
                # Kept, because it may be one; it is quarantined when a run continues.
                self._ends_domain[name] = True
        return self._ends_domain[name]


def _find_problem(path: Path, record: FileRecord) -> str | None:
    try:
        size = path.stat().st_size
        if size != record.size:
            return f"{path.name} has {size} bytes, expected {record.size}"
        return None if checksum(path) == record.sha256 else f"{path.name} was altered: its checksum differs"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"


def find_latest_valid(store: CheckpointStore, ranks: ProcessGroup) -> Manifest | None:
    """The newest checkpoint whose files match its manifest; None where none was ever saved; a collective.

    The ranks share the work of reading. Corrupt checkpoints are reported in a warning and quarantined.

    Raises:
        CheckpointError: there are checkpoints, but no valid one.
    """
    names = ranks.all_gather_object(store.names() if ranks.info.is_main else [])[0]
    # Newest first; usually the first one is valid.
    for name in reversed(names):
        manifest, problems = validate_checkpoint(store, name, ranks)
        if not problems:
            return manifest
        ranks.run_on_main(lambda name=name, problems=problems: store.quarantine(name, problems))  # type: ignore[misc]
    if names or ranks.all_gather_object(store.has_corrupted)[0]:
        raise CheckpointError(
            f"{store.folder}: found no valid checkpoint, {len(names)} were corrupt (see the warnings above); restore "
            "an intact copy of one, or start over with another output_dir"
        )
    return None


def validate_checkpoint(store: CheckpointStore, name: str, ranks: ProcessGroup) -> tuple[Manifest | None, list[str]]:
    """(manifest, problems found by any rank); ranks share the files; a collective."""
    rank = ranks.info.rank
    world_size = ranks.info.world_size
    manifest = None
    try:
        manifest = read_manifest(store.folder / name)
        problems = store.find_problems(name, manifest, lambda index: index % world_size == rank)
    except CheckpointError as error:
        problems = [str(error)]
    # All ranks report the same unreadable manifest: each problem once.
    problems_by_rank = ranks.all_gather_object(problems)
    return manifest, list(dict.fromkeys(problem for problems in problems_by_rank for problem in problems))
