"""Asynchronous checkpointer: ranks stage their state, write it while training continues, and publish it together."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from das_ds.checkpoint.async_writer import BackgroundWriter
from das_ds.checkpoint.format import file_name, immutable_tensors, mutable_tensors
from das_ds.checkpoint.manifest import CheckpointMetadata, FileRecord, Manifest, RunState
from das_ds.checkpoint.store import CheckpointStore
from das_ds.distributed.process_group import ProcessGroup
from das_ds.distributed.state import ComponentState, Shard
from das_ds.errors import CheckpointError

MIB = 2**20


@dataclass(frozen=True)
class SaveReport:
    """Cost of a checkpoint."""

    name: str
    stall_seconds: float
    """Time that training on rank 0 waited."""
    write_seconds: float
    """Time that writing took on the slowest rank."""
    mebibytes: float
    """Size of all ranks' files."""


class AsyncCheckpointer:
    """Saves one checkpoint at a time; every method but `wait_for_staging` is called on all ranks.

    Args:
        ranks: the process group.
        store: where checkpoints are written.
        shards: the shards of all weights that this rank writes.
        asynchronous: see `BackgroundWriter`.
        fsync_also: see `BackgroundWriter`.
    """

    def __init__(
        self,
        ranks: ProcessGroup,
        store: CheckpointStore,
        shards: list[Shard],
        *,
        asynchronous: bool,
        fsync_also: Sequence[Path] = (),
    ) -> None:
        self._ranks = ranks
        self._store = store
        self._shards = shards
        self.asynchronous = asynchronous
        """Whether training continues between `start` and `publish`."""
        self._writer = BackgroundWriter(ranks.info.device, asynchronous=asynchronous, fsync_also=fsync_also)
        # Rank 0 alone reads the folder: on a network file system ranks may see different contents.
        self._number = ranks.all_gather_object(store.next_number)[0]
        self._manifest: Manifest | None = None
        self._stall_seconds = 0.0
        ranks.run_on_main(store.clear_staging)

    @property
    def is_open(self) -> bool:
        """Whether a checkpoint was started and is not published yet."""
        return self._manifest is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank's file is still being written."""
        return self._writer.is_busy

    @property
    def has_failed(self) -> bool:
        """Whether this rank's file could not be written."""
        return self.is_open and self._writer.failure is not None

    def start(self, run: RunState, states: Mapping[str, ComponentState], metadata: CheckpointMetadata) -> None:
        """Begin a checkpoint; the one before must be published.

        Args:
            run: progress of the run.
            states: component -> its state.
            metadata: for the manifest.

        Raises:
            CheckpointError: the folder cannot be created.
        """
        assert not self.is_open, "one checkpoint at a time"
        self._stall_seconds = 0.0
        with self._stalling():
            name = f"{self._number:06d}_{metadata.domain}_{run.phase}_{run.domain_step}"
            self._number += 1
            self._manifest = Manifest(
                name=name,
                run=run,
                world_size=metadata.world_size,
                zero_stage=metadata.zero_stage,
                metadata={component: state.metadata for component, state in states.items()},
                metrics_bytes=metadata.metrics_bytes,
                wandb_run_id=metadata.wandb_run_id,
                saved_at=datetime.now(UTC).isoformat(timespec="seconds"),
                versions=metadata.versions,
                files={},
            )
            info = self._ranks.info
            path = self._store.staging_dir(name) / file_name(info.rank, info.world_size)
            immutable = immutable_tensors(states, is_main=info.is_main)
            self._writer.start(path, mutable_tensors(states, self._shards), immutable)

    def wait_for_staging(self) -> None:
        """Wait until the state is copied and may change."""
        with self._stalling():
            self._writer.wait_for_staging()

    def wait(self) -> None:
        """Wait until all checkpoints that are no longer kept are removed."""
        self._store.wait_for_removals()

    def publish(self) -> SaveReport:
        """Wait for the files of all ranks, and make the checkpoint visible.

        Raises:
            CheckpointError: on every rank, when any rank could not write.
        """
        assert self._manifest is not None, "a checkpoint was started"
        manifest = self._manifest
        self._manifest = None
        with self._stalling():
            # Gathered also on failure, so that no rank waits for one that could not write.
            record, failure = self._finish_file()
            results = self._ranks.all_gather_object((record, failure, self._writer.write_seconds))
            failures = [failure for _, failure, _ in results if failure is not None]
            if failures:
                self._ranks.run_on_main(self._store.clear_staging)
                raise failures[0]
            world_size = self._ranks.info.world_size
            records = [record for record, _, _ in results if record is not None]
            files = {file_name(rank, world_size): record for rank, record in enumerate(records)}
            complete = manifest.model_copy(update={"files": files})
            self._ranks.run_on_main(lambda: self._store.publish(complete))
        return SaveReport(
            name=manifest.name,
            stall_seconds=self._stall_seconds,
            write_seconds=max(seconds for _, _, seconds in results),
            mebibytes=sum(record.size for record in records) / MIB,
        )

    def _finish_file(self) -> tuple[FileRecord | None, CheckpointError | None]:
        """Wait for this rank's file: its record, or the error."""
        try:
            return self._writer.finish(), None
        except CheckpointError as error:
            return None, error

    @contextmanager
    def _stalling(self) -> Iterator[None]:
        """Count the time of this block as time that training waits."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._stall_seconds += time.perf_counter() - began
