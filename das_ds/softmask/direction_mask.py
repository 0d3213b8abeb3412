"""Mask of directions: every vector of masked matrices in a rank's shards times the projector of its input.

Applied to gradients, it is a mask of the engine: G <- G P before the norm is taken for clipping and before the
optimizer. An optimizer that divides by the size of each element undoes a mask that scales elements, but not P, which
mixes columns. `direction_update_mask` multiplies the optimizer's update by the same code.

Shape legend: n vectors, d elements of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch

from das_ds.distributed.collectives import rank, world_size
from das_ds.distributed.neighbor_exchange import Exchanges, run_exchanges
from das_ds.distributed.state import Shard
from das_ds.engine.matmul_precision import tf32
from das_ds.functional.projectors import VectorMap
from das_ds.softmask.fragments import find_fragments
from das_ds.softmask.mask_layout import Batch, MaskLayout, gather_cut_elements, plan_layout
from das_ds.softmask.masked_matrix import MaskedMatrix
from das_ds.softmask.matrix_blocks import Block, find_held_elements
from das_ds.softmask.projection import project_views

Write = Callable[[list[torch.Tensor], list[torch.Tensor]], None]
"""(views of vectors x or of fragments of them, the same of x P) -> None; changes the views."""


class DirectionMask:
    """Multiplies vectors by projectors; a mask of gradients.

    Extra memory: what `projection` and `cut_vectors` state. Where nothing is cut on any rank there is no collective.

    Args:
        shards: this rank's.
        layout: which vectors of them are multiplied, and where.
        projectors: input -> P, of all inputs that this rank needs, on `device`.
        device: where products and collectives run; tensors on another one are streamed through it.
    """

    def __init__(
        self, shards: Sequence[Shard], layout: MaskLayout, projectors: Mapping[str, VectorMap], device: torch.device
    ) -> None:
        self.layout = layout
        self._shards = shards
        self._projectors = projectors
        self._device = device

    def apply_(self, gradients: Sequence[torch.Tensor]) -> None:
        """x <- x P for every vector x; a collective where shards of any rank cut vectors.

        Args:
            gradients: (numel,) of each shard, all of one type, float32 or 16 bits.

        Raises:
            ValueError: tensors of another number, size or type.
        """
        run_exchanges(self.steps(gradients, torch._foreach_copy_))

    def interpolate_(self, tensors: Sequence[torch.Tensor], weight: float) -> None:
        """x <- x + weight (x P - x) for every vector x; a collective, with errors, like `apply_`."""
        run_exchanges(self.steps(tensors, partial(_lerp, weight=weight)))

    @torch.no_grad()
    def steps(self, tensors: Sequence[torch.Tensor], write: Write) -> Exchanges:
        """Write the products of all vectors; a generator, so that exchanges need not be real."""
        self._check(tensors)
        with tf32(self._device):
            for batch in self.layout.batches:
                self._write_complete(batch, tensors, write)
        for cut in self.layout.rounds:
            views = [self._view(tensors, fragment.shard, fragment.block) for fragment in cut.sent]
            dtype = tensors[0].dtype if tensors else torch.float32
            returned = yield from cut.complete(views, dtype, self._projectors, self._device)
            if views:
                write([view.squeeze(0) for view in views], returned)

    def _check(self, tensors: Sequence[torch.Tensor]) -> None:
        found = [tensor.numel() for tensor in tensors]
        expected = [shard.numel for shard in self._shards]
        if found != expected:
            raise ValueError(f"tensors: found sizes {found}, expected {expected}, one tensor per shard")
        types = {tensor.dtype for tensor in tensors}
        if len(types) > 1:
            raise ValueError(f"tensors: found types {', '.join(sorted(map(str, types)))}, expected one type")

    def _view(self, tensors: Sequence[torch.Tensor], shard: int, block: Block) -> torch.Tensor:
        return block.view(tensors[shard], self._shards[shard].param_start)

    def _write_complete(self, batch: Batch, tensors: Sequence[torch.Tensor], write: Write) -> None:
        views = [self._view(tensors, placed.shard, placed.block) for placed in batch.blocks]
        write(views, project_views(views, self._projectors[batch.input], self._device))


def build_direction_mask(
    shards: Sequence[Shard],
    matrices: Sequence[MaskedMatrix],
    projectors: Mapping[str, VectorMap],
    device: torch.device,
) -> DirectionMask:
    """Mask of the vectors of these matrices in all of this rank's shards; a collective.

    Args:
        shards: this rank's, in the order of the tensors that are to be masked.
        matrices: all that are masked, in the same order on every rank.
        projectors: input -> P, equal on all ranks that have it; those of inputs that this rank steps a matrix of are
            read.
        device: see `DirectionMask`.
    """
    listed = list(matrices)
    held = find_held_elements(shards, listed)
    fragments = find_fragments(listed, gather_cut_elements(held, listed))
    layout = plan_layout(listed, held, fragments.values(), rank(), world_size())
    return DirectionMask(shards, layout, projectors, device)


class DirectionDecayMask:
    """Decoupled weight decay of one flat tensor that moves weights along open directions only.

    AdamW and Lion step W <- (1 - r) W - U with the decay r = learning rate * weight decay. W <- (1 - r) W + r (W - W P)
    - U = W - r W P - U is the decay through P; the weights that give it are W + r / (1 - r) (W - W P) before the step.

    Args:
        shards: this rank's in the flat tensor.
        mask: of the same shards.
    """

    def __init__(self, shards: Sequence[Shard], mask: DirectionMask) -> None:
        self._spans = [shard.span for shard in shards]
        self._mask = mask

    def compensate_(self, weights: torch.Tensor, decay: float) -> None:
        """W <- W + r / (1 - r) (W - W P); as many operations as the mask of the gradient, and as large an exchange.

        Args:
            weights: (F,), before a step that multiplies them by 1 - r.
            decay: r.
        """
        self._mask.interpolate_([weights[span] for span in self._spans], -decay / (1.0 - decay))


def build_decay_masks(
    shards: Sequence[Shard],
    flats: Mapping[str, torch.Tensor],
    matrices: Sequence[MaskedMatrix],
    projectors: Mapping[str, VectorMap],
    device: torch.device,
) -> dict[torch.Tensor, DirectionDecayMask]:
    """Flat tensor -> mask of its weight decay, of all that hold a masked matrix on any rank; a collective.

    Args:
        shards, matrices, projectors, device: see `build_direction_mask`.
        flats: parameter -> flat tensor that it lies in, also where this rank has no shard of it.
    """
    masks = {}
    for flat, in_flat, layout in plan_by_flat(shards, flats, matrices):
        masks[flat] = DirectionDecayMask(in_flat, DirectionMask(in_flat, layout, projectors, device))
    return masks


def plan_by_flat(
    shards: Sequence[Shard], flats: Mapping[str, torch.Tensor], matrices: Sequence[MaskedMatrix]
) -> Iterator[tuple[torch.Tensor, list[Shard], MaskLayout]]:
    """(flat tensor, this rank's shards in it, their layout) of all with a masked matrix on any rank; a collective."""
    listed = list(matrices)
    by_flat: dict[torch.Tensor, list[int]] = {}
    for number, matrix in enumerate(listed):
        by_flat.setdefault(flats[matrix.parameter], []).append(number)
    in_flat = {flat: [shard for shard in shards if shard.flat is flat] for flat in by_flat}
    # Numbers of shards are those within their flat tensor.
    held = {flat: find_held_elements(in_flat[flat], listed) for flat in by_flat}
    cut_by_rank = gather_cut_elements([item for items in held.values() for item in items], listed)
    fragments = find_fragments(listed, cut_by_rank)
    for flat, group in by_flat.items():
        cut = [fragments[number] for number in group if number in fragments]
        yield flat, in_flat[flat], plan_layout(listed, held[flat], cut, rank(), world_size())


def _lerp(views: list[torch.Tensor], products: list[torch.Tensor], weight: float) -> None:
    torch._foreach_lerp_(views, products, weight)
