"""Checkpoint reader: gives each component of a run the state that it saved."""

from __future__ import annotations

from pathlib import Path

from das_ds.checkpoint.format import RankFileReader, StoredComponentState
from das_ds.checkpoint.manifest import Manifest
from das_ds.distributed.process_group import RankInfo
from das_ds.distributed.state import Shard


class CheckpointReader:
    """Reads what this rank needs; rank-local tensors only with the world size and ZeRO stage that wrote them.

    Args:
        folder: of all checkpoints.
        manifest: of a valid checkpoint.
        info: this rank.
        zero_stage: of its engine.
        shards: of its engine.
    """

    def __init__(self, folder: Path, manifest: Manifest, info: RankInfo, zero_stage: int, shards: list[Shard]) -> None:
        self._metadata = manifest.metadata
        is_same_sharding = (manifest.world_size, manifest.zero_stage) == (info.world_size, zero_stage)
        own_rank = info.rank if is_same_sharding else None
        self._files = RankFileReader(folder / manifest.name, manifest.world_size, own_rank, shards)

    def component(self, name: str) -> StoredComponentState:
        """The saved state of one component."""
        return StoredComponentState(self._files, name, self._metadata[name])

    def close(self) -> None:
        """Close the files."""
        self._files.close()
