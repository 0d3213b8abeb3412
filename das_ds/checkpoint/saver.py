"""Saving a checkpoint from all ranks: copy, write beside training, agree, make visible."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from das_ds.checkpoint.async_writer import BackgroundWriter
from das_ds.checkpoint.format import file_name, immutable_tensors, mutable_tensors
from das_ds.checkpoint.manifest import FileRecord, Manifest, RunState
from das_ds.checkpoint.store import CheckpointStore
from das_ds.distributed.process_group import ProcessGroup
from das_ds.distributed.state import ComponentState, Shard
from das_ds.errors import CheckpointError

MIB = 2**20


@dataclass(frozen=True)
class SaveReport:
    """What a checkpoint cost."""

    name: str
    stall_seconds: float
    """Time that training on rank 0 waited."""
    write_seconds: float
    """Time that writing took on the slowest rank."""
    mebibytes: float
    """Size of all ranks' files."""


class AsyncCheckpointer:
    """Saves one checkpoint at a time; everything but `wait_for_copy` is called on all ranks.

    Args:
        ranks: the process group.
        store: where checkpoints go.
        shards: what this rank stores of all weights.
        asynchronous: see `BackgroundWriter`.
        about: what stays the same in every manifest (`world_size`, `zero_stage`, `versions`).
        beside: see `BackgroundWriter`.
    """

    def __init__(
        self,
        ranks: ProcessGroup,
        store: CheckpointStore,
        shards: list[Shard],
        about: dict[str, Any],
        *,
        asynchronous: bool,
        beside: Sequence[Path] = (),
    ) -> None:
        self._ranks, self._store, self._shards, self._about = ranks, store, shards, about
        self.asynchronous = asynchronous
        """Whether training goes on between `start` and `publish`."""
        self._writer = BackgroundWriter(ranks.info.device, asynchronous=asynchronous, beside=beside)
        self._number = ranks.gather(store.next_number)[0]
        self._manifest: Manifest | None = None
        self._stall = 0.0
        ranks.run_on_main(store.clear_partial)

    @property
    def is_open(self) -> bool:
        """Whether a checkpoint was started and is not yet visible."""
        return self._manifest is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank's file is still being written."""
        return self._writer.is_busy

    @property
    def has_failed(self) -> bool:
        """Whether this rank's file could not be written."""
        return self.is_open and self._writer.failure is not None

    def start(
        self,
        run: RunState,
        parts: dict[str, ComponentState],
        *,
        domain: str,
        metrics_bytes: int,
        wandb_run_id: str | None,
    ) -> None:
        """Begin a checkpoint; the one before must be visible.

        Args:
            run: where the run stands.
            parts: part of the program -> its state.
            domain: name of the present domain.
            metrics_bytes, wandb_run_id: of rank 0's tracker.

        Raises:
            CheckpointError: the folder cannot be made.
        """
        assert not self.is_open, "one checkpoint at a time"
        self._stall = 0.0
        with self._stalling():
            name = f"{self._number:06d}_{domain}_{run.phase}_{run.domain_step}"
            self._number += 1
            self._manifest = Manifest(
                name=name,
                run=run,
                numbers={part: state.numbers for part, state in parts.items()},
                metrics_bytes=metrics_bytes,
                wandb_run_id=wandb_run_id,
                saved_at=datetime.now(UTC).isoformat(timespec="seconds"),
                files={},
                **self._about,
            )
            info = self._ranks.info
            path = self._store.partial(name) / file_name(info.rank, info.world_size)
            fixed = immutable_tensors(parts, is_main=info.is_main)
            self._writer.start(path, mutable_tensors(parts, self._shards), fixed)

    def wait_for_copy(self) -> None:
        """Return when what is being saved may change."""
        with self._stalling():
            self._writer.wait_for_copy()

    def close(self) -> None:
        """Return when what is no longer kept is gone."""
        self._store.wait_for_removals()

    def publish(self) -> SaveReport:
        """Wait for all ranks' files and make the checkpoint visible.

        Raises:
            CheckpointError: on every rank, when a rank could not write.
        """
        assert self._manifest is not None, "a checkpoint was started"
        manifest, self._manifest = self._manifest, None
        with self._stalling():
            record, failure = None, None
            try:
                record = self._writer.finish()
            except CheckpointError as error:
                failure = error
            parts = self._ranks.gather((record, failure, self._writer.write_seconds))
            failures = [failure for _, failure, _ in parts if failure is not None]
            if failures:
                self._ranks.run_on_main(self._store.clear_partial)
                raise failures[0]
            size = self._ranks.info.world_size
            files = {file_name(rank, size): record for rank, (record, _, _) in enumerate(parts)}
            whole = manifest.model_copy(update={"files": files})
            self._ranks.run_on_main(lambda: self._store.publish(whole))
        return SaveReport(
            manifest.name,
            self._stall,
            max(seconds for _, _, seconds in parts),
            sum(record.size for record in files.values() if isinstance(record, FileRecord)) / MIB,
        )

    @contextmanager
    def _stalling(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._stall += time.perf_counter() - began
