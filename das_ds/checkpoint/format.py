"""One rank's tensors in a safetensors file, and reading from all ranks' files what another division needs."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from das_ds.distributed.state import ComponentState, Flats, Shard

SHARDED, SHARED, LOCAL = "sharded", "shared", "local"
SEPARATOR = "|"


def file_name(rank: int, world_size: int) -> str:
    """Name of a rank's file."""
    return f"rank_{rank:05d}_of_{world_size:05d}.safetensors"


def mutable_tensors(parts: dict[str, ComponentState], shards: Iterable[Shard]) -> dict[str, torch.Tensor]:
    """Key -> (n,) view of the values by weight that this rank stores, which training may change.

    Args:
        parts: part of the program -> its state.
        shards: what this rank stores of all weights.
    """
    return {
        SEPARATOR.join((SHARDED, part, name, shard.name, str(shard.param_start))): flats[shard.flat][shard.span]
        for shard in shards
        for part, state in parts.items()
        for name, flats in state.sharded.items()
        if shard.flat in flats
    }


def immutable_tensors(parts: dict[str, ComponentState], *, is_main: bool) -> dict[str, torch.Tensor]:
    """Key -> copy in host memory of everything else; only rank 0 stores what is equal on all."""
    return {
        SEPARATOR.join((kind, part, name)): value.detach().cpu().clone().contiguous()
        for part, state in parts.items()
        for kind, values in ((LOCAL, state.local), (SHARED, state.shared if is_main else {}))
        for name, value in values.items()
    }


@dataclass(frozen=True)
class _Piece:
    file: Any
    key: str
    offset: int
    numel: int


class RankFileReader:
    """The tensors of a checkpoint, read by the stretches that this rank needs.

    Args:
        folder: the checkpoint, which was found whole.
        world_size: number of ranks that wrote it.
        own_rank: whose local tensors are wanted; None: nobody's.
        shards: this rank's shards now.
    """

    def __init__(self, folder: Path, world_size: int, own_rank: int | None, shards: list[Shard]) -> None:
        self._shards = shards
        self._files = ExitStack()
        self._pieces: dict[tuple[str, str], dict[str, list[_Piece]]] = {}
        self._small: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
        self._locals: dict[tuple[str, str], list[tuple[Any, str]]] = {}
        for rank in range(world_size):
            file = self._files.enter_context(safe_open(folder / file_name(rank, world_size), framework="pt"))
            for key in file.keys():  # noqa: SIM118 (no dictionary)
                kind, part, name, *place = key.split(SEPARATOR)
                if kind == SHARDED:
                    numel = file.get_slice(key).get_shape()[0]
                    piece = _Piece(file, key, int(place[1]), numel)
                    self._pieces.setdefault((part, name), {}).setdefault(place[0], []).append(piece)
                    continue
                if kind == LOCAL:
                    self._locals.setdefault((part, name), []).append((file, key))
                if kind == SHARED or rank == own_rank:
                    self._small.setdefault((kind, part), {})[name] = file.get_tensor(key)

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def small(self, kind: str, part: str) -> dict[str, torch.Tensor]:
        """Shared or local tensors of a part."""
        return self._small.get((kind, part), {})

    def every_local(self, part: str, name: str) -> list[torch.Tensor]:
        """Local tensors of this name of all ranks, in their order."""
        return [file.get_tensor(key) for file, key in self._locals.get((part, name), ())]

    def has(self, part: str, name: str) -> bool:
        """Whether there are values by weight of this name."""
        return (part, name) in self._pieces

    def sizes(self, part: str, name: str) -> dict[str, int]:
        """Parameter -> number of its values of this name, those of all ranks together."""
        pieces = self._pieces.get((part, name), {})
        return {parameter: sum(piece.numel for piece in parts) for parameter, parts in pieces.items()}

    def flats(self, part: str, name: str) -> Flats:
        """See `SavedComponentState.sharded`."""
        result: Flats = {}
        by_parameter = self._pieces.get((part, name), {})
        for shard in self._shards:
            for piece in by_parameter.get(shard.name, ()):
                first = max(shard.param_start, piece.offset)
                last = min(shard.param_start + shard.numel, piece.offset + piece.numel)
                if first >= last:
                    continue
                values = piece.file.get_slice(piece.key)[first - piece.offset : last - piece.offset]
                if shard.flat not in result:
                    result[shard.flat] = torch.zeros(shard.flat.numel(), dtype=values.dtype, device=shard.flat.device)
                start = shard.flat_start + first - shard.param_start
                result[shard.flat][start : start + last - first].copy_(values)
        return result


@dataclass(frozen=True)
class StoredComponentState:
    """`SavedComponentState` of one part of the program."""

    stored: RankFileReader
    name: str
    numbers: dict[str, Any]

    def has_sharded(self, name: str) -> bool:
        """See `SavedComponentState`."""
        return self.stored.has(self.name, name)

    def sizes(self, name: str) -> dict[str, int]:
        """See `SavedComponentState`."""
        return self.stored.sizes(self.name, name)

    def sharded(self, name: str) -> Flats:
        """See `SavedComponentState`."""
        return self.stored.flats(self.name, name)

    def shared(self) -> dict[str, torch.Tensor]:
        """See `SavedComponentState`."""
        return self.stored.small(SHARED, self.name)

    def local(self) -> dict[str, torch.Tensor]:
        """See `SavedComponentState`."""
        return self.stored.small(LOCAL, self.name)

    def every_local(self, name: str) -> list[torch.Tensor]:
        """See `SavedComponentState`."""
        return self.stored.every_local(self.name, name)
