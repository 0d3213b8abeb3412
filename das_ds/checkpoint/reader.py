"""A checkpoint that a run continues from, part by part."""

from __future__ import annotations

from pathlib import Path

from das_ds.checkpoint.format import RankFileReader, StoredComponentState
from das_ds.checkpoint.manifest import Manifest
from das_ds.distributed.process_group import RankInfo
from das_ds.distributed.state import Shard


class CheckpointReader:
    """Reads what this rank needs; its own tensors only where ranks and stage are those that wrote.

    Args:
        folder: of all checkpoints.
        manifest: of one that was found whole.
        info: this rank.
        zero_stage: of its engine.
        shards: of its engine.
    """

    def __init__(self, folder: Path, manifest: Manifest, info: RankInfo, zero_stage: int, shards: list[Shard]) -> None:
        self._numbers = manifest.numbers
        is_same_division = (manifest.world_size, manifest.zero_stage) == (info.world_size, zero_stage)
        own_rank = info.rank if is_same_division else None
        self._stored = RankFileReader(folder / manifest.name, manifest.world_size, own_rank, shards)

    def part(self, name: str) -> StoredComponentState:
        """The state of one part of the program."""
        return StoredComponentState(self._stored, name, self._numbers[name])

    def close(self) -> None:
        """Close the files."""
        self._stored.close()
