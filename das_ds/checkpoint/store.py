"""The folder of a run's checkpoints: making one visible, keeping few, finding the newest that is whole.

Which checkpoint a run continues from; all ranks agree.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from das_ds.checkpoint.manifest import FileRecord, Manifest, read_manifest
from das_ds.distributed.process_group import ProcessGroup
from das_ds.errors import CheckpointError
from das_ds.run_dir import CHECKPOINTS_DIR, PARTIAL
from das_ds.storage import checksum, sync, sync_all
from das_ds.thread_guard import ThreadGuard

logger = logging.getLogger(__name__)

BROKEN = ".broken"
NAME = re.compile(r"^\d{6,}_[^.]*$")


class CheckpointStore:
    """Checkpoints `<number>_<domain>_<phase>_<step>` of one run; rank 0 alone changes the folder.

    Args:
        root: the run folder.
        keep: newest checkpoints to keep, besides the one at the end of every domain.
    """

    def __init__(self, root: Path, keep: int) -> None:
        self.folder = root / CHECKPOINTS_DIR
        self._keep = keep
        self._ends: dict[str, bool] = {}
        # Removing gigabytes takes a while, which training need not wait for.
        self._remover = ThreadPoolExecutor(1)
        self._removing = ThreadGuard(
            f"{self.folder}: an old checkpoint cannot be removed, so that the disk may fill; training goes on"
        )

    def names(self) -> list[str]:
        """Checkpoints from the oldest to the newest, whole or not."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((p.name for p in found if NAME.match(p.name)), key=lambda name: int(name.split("_")[0]))

    @property
    def has_corrupted(self) -> bool:
        """Whether a checkpoint was once found damaged."""
        return any(self.folder.glob(f"*{BROKEN}"))

    @property
    def next_number(self) -> int:
        """Number of the next checkpoint: none comes again, also after a return to an earlier one."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return max((int(number[0]) for p in found if (number := re.findall(r"^\d+", p.name))), default=-1) + 1

    def partial(self, name: str) -> Path:
        """Where a checkpoint is written before it counts."""
        return self.folder / f"{PARTIAL}{name}"

    def clear_partial(self) -> None:
        """Remove what saves that were never finished left behind."""
        for path in self.folder.glob(f"{PARTIAL}*"):
            shutil.rmtree(path, ignore_errors=True)

    def publish(self, manifest: Manifest) -> None:
        """Make a checkpoint visible, all files of which are on disk, and drop those that are no longer kept.

        Raises:
            CheckpointError: the disk is full or the folder cannot be written.
        """
        partial = self.partial(manifest.name)
        try:
            manifest.write(partial)
            sync_all(partial)
            os.replace(partial, self.folder / manifest.name)
            sync(self.folder)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder / manifest.name}: cannot be written ({error.strerror or error}); the checkpoint before "
                "it is as it was"
            ) from error
        self._ends[manifest.name] = manifest.run.ends_domain
        self._prune()

    def quarantine(self, name: str, reasons: list[str]) -> None:
        """Warn about a checkpoint that is not whole and rename it, so that it is never looked at again."""
        logger.warning("checkpoint %s is not whole and is left out: %s", name, "; ".join(reasons))
        os.replace(self.folder / name, self.folder / f"{name}{BROKEN}")

    def wait_for_removals(self) -> None:
        """Return when what is no longer kept is gone."""
        self._remover.submit(lambda: None).result()

    def problems(self, name: str, manifest: Manifest, part: Callable[[int], bool]) -> list[str]:
        """What is wrong with those files of a checkpoint whose number `part` picks."""
        records = [item for number, item in enumerate(sorted(manifest.files.items())) if part(number)]
        return [problem for file, record in records if (problem := _problem(self.folder / name / file, record))]

    def _prune(self) -> None:
        for name in self.names()[: -self._keep]:
            if not self._is_end(name):
                # Renamed first: a removal that is interrupted must not leave half a checkpoint under its name.
                gone = self.partial(name)
                os.replace(self.folder / name, gone)
                self._remover.submit(self._remove, gone)

    def _remove(self, folder: Path) -> None:
        with self._removing:
            shutil.rmtree(folder, ignore_errors=True)
            if folder.exists():
                # Again, for the reason.
                shutil.rmtree(folder)

    def _is_end(self, name: str) -> bool:
        if name not in self._ends:
            try:
                self._ends[name] = read_manifest(self.folder / name).run.ends_domain
            except CheckpointError:
                self._ends[name] = True
        return self._ends[name]


def _problem(path: Path, record: FileRecord) -> str | None:
    try:
        size = path.stat().st_size
        if size != record.size:
            return f"{path.name} has {size} bytes, expected {record.size}"
        return None if checksum(path) == record.sha256 else f"{path.name} was altered: its checksum differs"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"


def find_latest_valid(store: CheckpointStore, ranks: ProcessGroup) -> Manifest | None:
    """The newest checkpoint whose files are what its manifest says; None where there has never been one.

    The ranks share the work of reading. One that is not whole is named in a warning and set aside.

    Raises:
        CheckpointError: there are checkpoints, and none is whole.
    """
    names = ranks.gather(store.names() if ranks.info.is_main else [])[0]
    for name in reversed(names):
        manifest, problems = _examined(store, name, ranks)
        if not problems:
            return manifest
        ranks.run_on_main(lambda name=name, problems=problems: store.quarantine(name, problems))  # type: ignore[misc]
    if names or ranks.gather(store.has_corrupted)[0]:
        raise CheckpointError(
            f"{store.folder}: found no whole checkpoint, {len(names)} were damaged (see the warnings above); put back "
            "a sound copy of one, or start anew with another output_dir"
        )
    return None


def _examined(store: CheckpointStore, name: str, ranks: ProcessGroup) -> tuple[Manifest | None, list[str]]:
    rank, size = ranks.info.rank, ranks.info.world_size
    manifest, problems = None, []
    try:
        manifest = read_manifest(store.folder / name)
        problems = store.problems(name, manifest, lambda number: number % size == rank)
    except CheckpointError as error:
        problems = [str(error)]
    return manifest, list(dict.fromkeys(problem for found in ranks.gather(problems) for problem in found))
