"""Importance -> masks of an engine: on the optimizer's update, or on the gradient before it.

Shape legend: F elements of a flat tensor of the optimizer, L layers, U units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Literal, Protocol, TypeVar

import torch

from das_ds.config import MaskTarget, SoftmaskConfig
from das_ds.distributed.process_group import ProcessGroup
from das_ds.distributed.state import Shard
from das_ds.engine.gradient_mask import ElementwiseGradientMask
from das_ds.engine.mask import DecayMasks, ElementwiseMask, ElementwiseMasks, GradientMask, UpdateMasks
from das_ds.functional.masks import MaskTable, SegmentTable, build_lookup_tables, fill_gaps
from das_ds.functional.projectors import VectorMap
from das_ds.functional.units import UnitLayout, UnitValues
from das_ds.kernels.protection import NUM_LEVELS, Protection
from das_ds.softmask.direction_mask import build_decay_masks, build_direction_mask
from das_ds.softmask.direction_update_mask import build_update_masks
from das_ds.softmask.masked_matrix import MaskedMatrix
from das_ds.softmask.sharded_importance import ShardedImportance, apply_lookup

Settings = TypeVar("Settings", contravariant=True)
DirectionTarget = Literal["gradient", "update", "both"]
"""What masks of directions multiply: the gradient before the optimizer, the optimizer's update, or one after the other.
"""


class StepWeights(Protocol):
    """The weights that an optimizer steps, in flat tensors."""

    @property
    def shards(self) -> list[Shard]:
        """This rank's, at most one per parameter."""

    def flats_by_parameter(self) -> dict[str, torch.Tensor]:
        """Parameter -> the flat tensor that it is stepped in, also where this rank has no shard of it."""


class MaskedSteps(Protocol):
    """Optimizer steps that can be masked: those of das_ds's engine, or of another trainer."""

    @property
    def ranks(self) -> ProcessGroup:
        """The process group."""

    @property
    def weights(self) -> StepWeights:
        """What is stepped."""

    @property
    def decays_weights(self) -> bool:
        """Whether steps multiply weights by 1 - learning rate * weight decay."""

    def set_masks(self, masks: UpdateMasks, *, masks_decay: bool = True) -> None:
        """Mask the updates of these flat tensors from now on, and of no others."""

    def set_gradient_mask(self, mask: GradientMask | None, decay: DecayMasks | None = None) -> None:
        """Mask the gradients of `weights.shards` from now on, before they are clipped; None: no longer."""

    def set_frozen(self, frozen: Mapping[str, int]) -> None:
        """Leave the first elements of parameters bitwise unchanged in all further steps, and no others."""


class Maskable(Protocol[Settings]):
    """What `apply_masks` needs of an `Importance`."""

    def masks(self, settings: Settings) -> UpdateMasks:
        """Masks of the engine's flat tensors."""


def apply_masks(
    engine: MaskedSteps,
    importance: Maskable[Settings],
    settings: Settings,
    *,
    apply_to: MaskTarget = "update",
) -> None:
    """Soft-mask all further steps of an engine by an importance, and by nothing else.

    `first_moment` masks the gradient on its way into Adam's first moment, not into the second (Hu et al., *Hidden
    Failure Modes of Gradient Modification under Adam in Continual Learning*, arXiv 2604.22407, 2026):

        m <- b1 m + (1 - b1) M g          v <- b2 v + (1 - b2) g^2

    M = diag(1 - I) is constant from one reset of the moments to the next, and m is linear in g: this m is M times that
    of unmasked gradients, and the update, which is linear in m, M times the unmasked one. So the update is masked, and
    its weight decay, which is not part of the moment, is not.

    Args:
        engine: whose steps are masked.
        importance: source of the masks.
        settings: from which, with importance, they are made.
        apply_to: `gradient` and `first_moment` need element-wise masks of all flat tensors.
    """
    clear_masks(engine)
    masks = importance.masks(settings)
    if apply_to == "update":
        engine.set_masks(masks)
        return
    elementwise = {flat: mask for flat, mask in masks.items() if isinstance(mask, ElementwiseMask)}
    assert len(elementwise) == len(masks), "gradients are masked element by element"
    if apply_to == "first_moment":
        engine.set_masks(elementwise, masks_decay=False)
        return
    engine.set_gradient_mask(ElementwiseGradientMask(engine.weights.shards, elementwise))


def clear_masks(engine: MaskedSteps) -> None:
    """Mask nothing: earlier masks may be as large as the next ones, and both need not fit in memory."""
    engine.set_masks({})
    engine.set_gradient_mask(None)
    engine.set_frozen({})


def unit_masks(
    engine: MaskedSteps, layout: UnitLayout, importance: UnitValues, softmask: SoftmaskConfig
) -> ElementwiseMasks:
    """Masks by the importance of units, group -> (L, U): tables of segments, whose size does not grow with F."""
    shards = engine.weights.shards
    table = MaskTable(
        layout,
        include_consumers=softmask.include_consumers,
        unowned_update_scale=softmask.unowned_update_scale,
        groups=softmask.groups,
        exponent=softmask.exponent,
        device=shards[0].flat.device if shards else engine.ranks.info.device,
    )
    table.load(importance)
    by_flat: dict[torch.Tensor, list[Shard]] = {}
    for shard in shards:
        by_flat.setdefault(shard.flat, []).append(shard)
    return {flat: ElementwiseMask(_unit_protection(table, flat.numel(), in_flat)) for flat, in_flat in by_flat.items()}


def parameter_masks(
    engine: MaskedSteps, layout: UnitLayout, importance: ShardedImportance, softmask: SoftmaskConfig
) -> ElementwiseMasks:
    """Masks by the importance of every weight.

    Where the mask is not 1 - I itself it takes another byte per weight of the shards.
    """
    tables = build_lookup_tables(
        layout.owners,
        groups=softmask.groups,
        unowned_update_scale=softmask.unowned_update_scale,
        exponent=softmask.exponent,
        num_levels=NUM_LEVELS,
    )
    flats = importance.flats
    if tables is not None:
        flats = apply_lookup(engine.weights.shards, flats, tables)
    return {flat: ElementwiseMask(Protection(len(levels), importance=levels)) for flat, levels in flats.items()}


def mask_directions(
    engine: MaskedSteps,
    matrices: Sequence[MaskedMatrix],
    projectors: Mapping[str, VectorMap],
    *,
    apply_to: DirectionTarget,
    frozen: Mapping[str, int] | None = None,
) -> None:
    """Multiply gradients, updates or both by projectors in all further steps, and by nothing else; a collective.

    The caller calls `clear_masks` before it makes the projectors. Where only gradients are masked and weights decay,
    their decay is masked as well, which doubles the operations. A mask of updates contains the decay.

    Args:
        engine: whose steps are masked.
        matrices: all that are masked, in the same order on every rank.
        projectors: input -> P on the device of the process group, equal on all ranks that have it; those of the
            inputs that this rank steps a matrix of are needed.
        apply_to: what is multiplied.
        frozen: parameter -> how many of its first elements are not trained at all, see `Engine.set_frozen`.
    """
    engine.set_frozen(frozen or {})
    shards = engine.weights.shards
    flats = engine.weights.flats_by_parameter()
    device = engine.ranks.info.device
    if apply_to in ("update", "both"):
        engine.set_masks(build_update_masks(shards, flats, matrices, projectors, device))
    if apply_to in ("gradient", "both"):
        decay = None
        if apply_to == "gradient" and engine.decays_weights:
            decay = build_decay_masks(shards, flats, matrices, projectors, device)
        engine.set_gradient_mask(build_direction_mask(shards, matrices, projectors, device), decay)


def _unit_protection(table: MaskTable, numel: int, shards: list[Shard]) -> Protection:
    """Protection of a flat tensor of `numel` elements that the shards lie in."""
    segments = chain.from_iterable(
        table.segments(shard.name, start=shard.flat_start, offset=shard.param_start, numel=shard.numel)
        for shard in shards
    )
    return Protection(numel, table=SegmentTable(numel, fill_gaps(segments, numel), table.values))
