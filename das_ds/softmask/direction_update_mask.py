"""Mask of directions on the optimizer's update: dW <- dW P for the vectors of one flat tensor, chunk by chunk.

Shape legend: F elements of a flat tensor, E of it in chunk, n vectors, m columns of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from das_ds.distributed.neighbor_exchange import Exchanges, run_exchanges
from das_ds.distributed.state import Shard
from das_ds.engine.matmul_precision import tf32
from das_ds.functional.projectors import VectorMap
from das_ds.softmask.direction_mask import plan_by_flat
from das_ds.softmask.fragments import Fragment
from das_ds.softmask.mask_layout import Batch, MaskLayout
from das_ds.softmask.masked_matrix import MaskedMatrix
from das_ds.softmask.matrix_blocks import Block
from das_ds.softmask.projection import project_views
from das_ds.softmask.update_chunks import plan_chunks


class DirectionUpdateMask:
    """An `UpdateMask`: complete vectors are blended with their chunk, cut vectors after the last chunk.

    Until then weights in cut vectors are as before the step, and their updates are kept aside: at most two rows of each
    matrix that is cut, and all of transposed ones, whose every vector is cut.

    Args:
        shards: this rank's in the flat tensor.
        layout: of the same shards.
        projectors: input -> P, of all inputs that this rank needs, on `device`.
        device: where products and collectives run; tensors on another one are streamed through it.
        numel: F.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        layout: MaskLayout,
        projectors: Mapping[str, VectorMap],
        device: torch.device,
        numel: int,
    ) -> None:
        self._shards = shards
        self._layout = layout
        self._projectors = projectors
        self._device = device
        self._updates: dict[Fragment, torch.Tensor] = {}
        self._chunks = {chunk.span.start: chunk for chunk in plan_chunks(shards, layout, numel)}

    def chunks(self) -> Iterator[slice]:
        """At most `MAX_CHUNK_ELEMENTS` each; a complete vector lies in one of them."""
        for chunk in self._chunks.values():
            yield chunk.span

    def blend_(self, new: torch.Tensor, old: torch.Tensor, chunk: slice) -> None:
        """new <- old + (new - old) P where vectors are complete; fragments of others go back to old values."""
        planned = self._chunks[chunk.start]
        with tf32(self._device):
            for batch in planned.batches:
                self._blend_batch(batch, new, old, chunk)
        for fragment in planned.fragments:
            after_part, before_part = (
                self._view(values, fragment.shard, fragment.block, chunk) for values in (new, old)
            )
            self._updates[fragment] = after_part - before_part
            after_part.copy_(before_part)

    def _blend_batch(self, batch: Batch, new: torch.Tensor, old: torch.Tensor, chunk: slice) -> None:
        # A function of its own, so that its tensors are freed before the next batch.
        after, before = ([self._view(values, p.shard, p.block, chunk) for p in batch.blocks] for values in (new, old))
        updates = torch._foreach_sub(after, before)
        products = project_views(list(updates), self._projectors[batch.input], self._device)
        torch._foreach_copy_(after, before)
        torch._foreach_add_(after, products)

    def finish_(self, flat: torch.Tensor) -> None:
        """Blend cut vectors; a collective where there are any on any rank.

        Args:
            flat: (F,), of which every chunk was blended.
        """
        run_exchanges(self.finish_steps(flat))

    @torch.no_grad()
    def finish_steps(self, flat: torch.Tensor) -> Exchanges:
        """What `finish_` does, with exchanges that need not be real."""
        for cut in self._layout.rounds:
            updates = [self._updates.pop(fragment) for fragment in cut.sent]
            products = yield from cut.complete(updates, flat.dtype, self._projectors, self._device)
            if products:
                whole = slice(0, flat.numel())
                views = [self._view(flat, f.shard, f.block, whole).squeeze(0) for f in cut.sent]
                torch._foreach_add_(views, products)

    def _view(self, values: torch.Tensor, shard_number: int, block: Block, chunk: slice) -> torch.Tensor:
        shard = self._shards[shard_number]
        return block.view(values, chunk.start - shard.flat_start + shard.param_start)


def build_update_masks(
    shards: Sequence[Shard],
    flats: Mapping[str, torch.Tensor],
    matrices: Sequence[MaskedMatrix],
    projectors: Mapping[str, VectorMap],
    device: torch.device,
) -> dict[torch.Tensor, DirectionUpdateMask]:
    """Flat tensor -> mask of its updates, of all that hold a masked matrix on any rank; a collective.

    Args:
        shards, flats, matrices, projectors, device: see `direction_mask.build_decay_masks`.
    """
    return {
        flat: DirectionUpdateMask(in_flat, layout, projectors, device, flat.numel())
        for flat, in_flat, layout in plan_by_flat(shards, flats, matrices)
    }
