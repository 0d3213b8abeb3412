"""Masks of directions as one rank of many has them, where others neither send their moments nor say what they hold.

What ranks tell each other once, when masks are made, is computed for all of them; exchanges of a step are not touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any
from unittest.mock import patch

import torch

from das_ds.distributed import neighbor_exchange
from das_ds.distributed.neighbor_exchange import Outgoing
from das_ds.distributed.process_group import ProcessGroup
from das_ds.distributed.state import Shard
from das_ds.engine.engine import Engine
from das_ds.engine.zero import full_numel, full_shape
from das_ds.functional.directions import build_projector
from das_ds.functional.projectors import Projector
from das_ds.methods.directions import Directions
from das_ds.softmask import direction_mask, frozen_subspaces
from das_ds.softmask.direction import DirectionImportance
from das_ds.softmask.frozen_subspaces import SubspaceLayout
from das_ds.softmask.hidden_matrices import HiddenMatrix
from das_ds.softmask.input_layout import InputLayout, assign_owners, count_stepped
from das_ds.softmask.masked_matrix import MaskedMatrix
from das_ds.softmask.matrix_blocks import HeldElements, find_held_elements
from helpers.zero_layout import owned


def shards_of_ranks(engine: Engine, world_size: int) -> list[list[Shard]]:
    """The shards of all ranks; of others without values."""
    stage = engine.zero_stage
    sizes = {name: (full_numel(p), len(full_shape(p)) > 1) for name, p in engine.parameters.items()}
    nowhere = torch.empty(0)
    return [
        engine.weights.shards
        if stage == 0
        else [Shard(name, nowhere, 0, first, numel) for name, first, numel in owned(sizes, stage, rank, world_size)]
        for rank in range(world_size)
    ]


def tell_what_ranks_hold(engine: Engine, shards: list[list[Shard]]) -> None:
    """From now on masks are laid out as if every rank had told the others; in a process alone."""

    def gather(held: Iterable[HeldElements], listed: list[MaskedMatrix]) -> list[list[HeldElements]]:
        gathered = [find_held_elements(of_rank, listed) for of_rank in shards]
        # Numbers of this rank's shards are those that its masks have.
        gathered[engine.ranks.info.rank] = list(held)
        return gathered

    real_exchange = neighbor_exchange.exchange

    def exchange(outgoing: Outgoing) -> torch.Tensor:
        # The fake backend refuses to receive where nothing is sent.
        if len(outgoing.values):
            return real_exchange(outgoing)
        return outgoing.values.new_zeros(sum(outgoing.receive_sizes))

    neighbor_exchange.exchange = exchange
    direction_mask.gather_cut_elements = gather  # type: ignore[assignment]


def protect_directions(method: Directions, world_size: int) -> None:
    """Give a method moments and, when it masks, projectors of all inputs that this rank steps; in a process alone."""
    engine = method.run.engine
    shards = shards_of_ranks(engine, world_size)
    tell_what_ranks_hold(engine, shards)
    matrices = method._inputs.matrices
    stepped = [count_stepped(matrices, of_rank) for of_rank in shards]
    widths = method._inputs.widths
    users = {name: tuple(r for r, counts in enumerate(stepped) if counts.get(name)) for name in widths}
    inputs = InputLayout(matrices, widths, assign_owners(widths, stepped), users)
    own = inputs.owned_by(engine.ranks.info.rank)

    def projectors(importance: DirectionImportance, _: Any) -> Iterator[tuple[str, Projector]]:
        dtype = torch.float32 if method.run.config.train.precision == "fp32" else torch.bfloat16
        for name in widths:
            if engine.ranks.info.rank in users[name]:
                yield name, build_projector(torch.eye(widths[name]), 2.0, method.settings.rank, dtype)

    DirectionImportance.projectors = projectors  # type: ignore[method-assign]
    moments = {name: torch.eye(width) if name in own else None for name, width in widths.items()}
    method._inputs = inputs
    method._importance = DirectionImportance(method.run, inputs, moments, None)
    method._is_prepared = True


def tell_what_ranks_project(engine: Engine, world_size: int) -> None:
    """From now on frozen subspaces are laid out as if every rank had told the others; in a process alone.

    At ZeRO stage 0 this rank decomposes all matrices, as no other sends it any.
    """
    tell_what_ranks_hold(engine, shards_of_ranks(engine, world_size))
    build = frozen_subspaces.build_subspace_layout
    own = engine.ranks.info.rank

    def build_alone(matrices: list[HiddenMatrix], shards: list[Shard], ranks: ProcessGroup) -> SubspaceLayout:
        # As if there were one more rank, which projects all of them.
        everything = {matrix.name for matrix in matrices}
        with patch.object(ProcessGroup, "all_gather_object", lambda self, value: [value, everything]):
            found = build(matrices, shards, ranks)
        owners = {name: own if 0 in users else (own + 1) % world_size for name, users in found.users.items()}
        return SubspaceLayout(found.matrices, {name: (owner,) for name, owner in owners.items()}, owners)

    frozen_subspaces.build_subspace_layout = build_alone  # type: ignore[assignment]
