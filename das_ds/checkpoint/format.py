"""Checkpoint file format: one safetensors file per rank, and a reader that reshards the tensors of other ranks.

Key of a tensor: `sharded|component|name|parameter|offset`, or `kind|component|name` for the kinds `replicated`,
`rank_local` and `owned`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from das_ds.distributed.state import ComponentState, Flats, Shard
from das_ds.errors import CheckpointError

SHARDED = "sharded"
REPLICATED = "replicated"
RANK_LOCAL = "rank_local"
OWNED = "owned"
SEPARATOR = "|"


def file_name(rank: int, world_size: int) -> str:
    """Name of a rank's file."""
    return f"rank_{rank:05d}_of_{world_size:05d}.safetensors"


def mutable_tensors(states: Mapping[str, ComponentState], shards: Iterable[Shard]) -> dict[str, torch.Tensor]:
    """Key -> (n,) view of the values by weight that this rank writes, which training may change.

    Args:
        states: component -> its state.
        shards: the shards of all weights that this rank writes.
    """
    tensors = {}
    for shard in shards:
        for component, state in states.items():
            for name, flats in state.sharded.items():
                if shard.flat in flats:
                    key = SEPARATOR.join((SHARDED, component, name, shard.name, str(shard.param_start)))
                    tensors[key] = flats[shard.flat][shard.span]
    return tensors


def immutable_tensors(states: Mapping[str, ComponentState], *, is_main: bool) -> dict[str, torch.Tensor]:
    """Key -> all other tensors in host memory; only rank 0 writes those that are equal on all ranks.

    They are copies, but for owned tensors, which may be as large as the model and are never changed.
    """
    tensors = {}
    for component, state in states.items():
        # Rank-local tensors of every rank; replicated ones once, in rank 0's file.
        for kind, values in ((RANK_LOCAL, state.rank_local), (REPLICATED, state.replicated if is_main else {})):
            for name, value in values.items():
                # One copy, also of a tensor on a GPU.
                copied = torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())
                tensors[SEPARATOR.join((kind, component, name))] = copied
        for name, value in state.owned.items():
            assert value.device.type == "cpu" and value.is_contiguous(), f"{name}: owned tensors are in host memory"
            tensors[SEPARATOR.join((OWNED, component, name))] = value.detach()
    return tensors


@dataclass(frozen=True)
class _SavedShard:
    """Values of one parameter that one rank wrote."""

    file: Any
    key: str
    offset: int
    """First element inside the flattened parameter."""
    numel: int


class RankFileReader:
    """The tensors of a checkpoint; only the values that this rank needs are read.

    Args:
        folder: a valid checkpoint.
        world_size: number of ranks that wrote it.
        own_rank: whose rank-local tensors are wanted; None: none.
        shards: this rank's shards in the present run.
    """

    def __init__(self, folder: Path, world_size: int, own_rank: int | None, shards: list[Shard]) -> None:
        self._shards = shards
        self._files = ExitStack()
        self._sharded: dict[tuple[str, str], dict[str, list[_SavedShard]]] = {}
        self._inline: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
        self._rank_local: dict[tuple[str, str], list[tuple[Any, str]]] = {}
        self._owned: dict[str, dict[str, tuple[Any, str]]] = {}
        for rank in range(world_size):
            file = self._files.enter_context(safe_open(folder / file_name(rank, world_size), framework="pt"))
            for key in file.keys():  # noqa: SIM118 (no dictionary)
                self._index(file, key, is_own=rank == own_rank)

    def _index(self, file: Any, key: str, *, is_own: bool) -> None:
        """Record where a tensor is; the small ones (replicated, this rank's own) are read at once."""
        kind, component, name, *location = key.split(SEPARATOR)
        if kind == SHARDED:
            parameter, offset = location
            numel = file.get_slice(key).get_shape()[0]
            by_parameter = self._sharded.setdefault((component, name), {})
            by_parameter.setdefault(parameter, []).append(_SavedShard(file, key, int(offset), numel))
            return
        if kind == OWNED:
            self._owned.setdefault(component, {})[name] = (file, key)
            return
        if kind == RANK_LOCAL:
            self._rank_local.setdefault((component, name), []).append((file, key))
        if kind == REPLICATED or is_own:
            self._inline.setdefault((kind, component), {})[name] = file.get_tensor(key)

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def read_inline(self, kind: str, component: str) -> dict[str, torch.Tensor]:
        """Replicated or rank-local tensors of a component."""
        return self._inline.get((kind, component), {})

    def read_all_rank_local(self, component: str, name: str) -> list[torch.Tensor]:
        """The rank-local tensors of this name of all ranks, in rank order."""
        return [file.get_tensor(key) for file, key in self._rank_local.get((component, name), ())]

    def owned_names(self, component: str) -> list[str]:
        """Names of the owned tensors of a component, sorted."""
        return sorted(self._owned.get(component, {}))

    def read_owned(self, component: str, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """See `SavedComponentState.owned`."""
        found = self._owned.get(component, {})
        tensors = {}
        for name in names:
            if name not in found:
                raise CheckpointError(
                    f"{component}: found no tensor {name} in the checkpoint, expected one that a rank owned; "
                    f"there are {', '.join(sorted(found)[:3]) or 'none'}{' ...' if len(found) > 3 else ''}"
                )
            file, key = found[name]
            # A copy: the file may be removed while the run needs the tensor.
            tensors[name] = file.get_tensor(key).clone()
        return tensors

    def has_sharded(self, component: str, name: str) -> bool:
        """Whether there are values by weight of this name."""
        return (component, name) in self._sharded

    def sizes(self, component: str, name: str) -> dict[str, int]:
        """Parameter -> number of its values of this name, those of all ranks together."""
        by_parameter = self._sharded.get((component, name), {})
        return {parameter: sum(shard.numel for shard in saved) for parameter, saved in by_parameter.items()}

    def read_sharded(self, component: str, name: str) -> Flats:
        """See `SavedComponentState.sharded`."""
        result: Flats = {}
        by_parameter = self._sharded.get((component, name), {})
        for shard in self._shards:
            for saved in by_parameter.get(shard.name, ()):
                # Intersection of the two shards, in elements of the flattened parameter.
                first = max(shard.param_start, saved.offset)
                last = min(shard.param_start + shard.numel, saved.offset + saved.numel)
                if first >= last:
                    continue
                values = saved.file.get_slice(saved.key)[first - saved.offset : last - saved.offset]
                if shard.flat not in result:
                    result[shard.flat] = torch.zeros(shard.flat.numel(), dtype=values.dtype, device=shard.flat.device)
                start = shard.flat_start + first - shard.param_start
                result[shard.flat][start : start + last - first].copy_(values)
        return result


@dataclass(frozen=True)
class StoredComponentState:
    """`SavedComponentState` of one component, read from files."""

    reader: RankFileReader
    component: str
    metadata: dict[str, Any]

    def has_sharded(self, name: str) -> bool:
        """See `SavedComponentState`."""
        return self.reader.has_sharded(self.component, name)

    def sizes(self, name: str) -> dict[str, int]:
        """See `SavedComponentState`."""
        return self.reader.sizes(self.component, name)

    def sharded(self, name: str) -> Flats:
        """See `SavedComponentState`."""
        return self.reader.read_sharded(self.component, name)

    def replicated(self) -> dict[str, torch.Tensor]:
        """See `SavedComponentState`."""
        return self.reader.read_inline(REPLICATED, self.component)

    def rank_local(self) -> dict[str, torch.Tensor]:
        """See `SavedComponentState`."""
        return self.reader.read_inline(RANK_LOCAL, self.component)

    def owned_names(self) -> list[str]:
        """See `SavedComponentState`."""
        return self.reader.owned_names(self.component)

    def owned(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """See `SavedComponentState`."""
        return self.reader.read_owned(self.component, names)

    def all_rank_local(self, name: str) -> list[torch.Tensor]:
        """See `SavedComponentState`."""
        return self.reader.read_all_rank_local(self.component, name)
