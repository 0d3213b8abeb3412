"""Direction mask: the rows of an optimizer's update times one matrix per parameter, wherever shards cut the rows.

Shape legend: F elements of a flat tensor, d columns of a parameter, r full rows of it in a shard, C cut rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from das_ds.distributed.collectives import all_reduce_sum, in_collective, world_size
from das_ds.distributed.state import Shard
from das_ds.engine.loss_scaler import tf32


@dataclass(frozen=True)
class _FullRows:
    """Consecutive complete rows of one parameter in this rank's flat tensor."""

    flat_slice: slice
    matrix: torch.Tensor
    """P, (d, d)."""


@dataclass(frozen=True)
class _RowFragment:
    """This rank's fragment of a row that several ranks share."""

    index: int
    """Of the row among the C cut rows."""
    flat_slice: slice
    columns: slice
    """Its columns, of the row's d."""
    matrix: torch.Tensor
    """P, (d, d)."""


@dataclass
class DirectionMask:
    """Mask of one flat tensor: dW <- dW P for every masked parameter W (o, d) in it, with its P (d, d).

    A row of the result needs the complete row of the update. Ranks that have fragments of a row each multiply theirs
    by the matching rows of P and add up: one small all-reduce per flat tensor and step, none where no row is cut.
    """

    device: torch.device
    """Where collectives run."""
    rows: list[_FullRows] = field(default_factory=list)
    fragments: list[_RowFragment] = field(default_factory=list)
    num_cut: int = 0
    """C, of all ranks."""
    width: int = 0
    """The largest d of the parameters with cut rows."""
    numel: int = 0
    """F."""

    def chunks(self) -> Iterator[slice]:
        """The complete flat tensor: every rank takes part in the all-reduce once."""
        yield slice(0, self.numel)

    def blend_(self, new: torch.Tensor, old: torch.Tensor, chunk: slice) -> None:
        """new <- old + (new - old) P row by row; a collective of the ranks that share the parameters."""
        # TF32 errs by 5e-4 of the update, where the mask leaves at least a hundredth.
        with tf32(new.device):
            for rows in self.rows:
                # (r, d): the same matrix for all rows, in one product; `after` is a view and is overwritten.
                after = new[rows.flat_slice].view(-1, len(rows.matrix))
                before = old[rows.flat_slice].view(-1, len(rows.matrix))
                torch.addmm(before, after - before, rows.matrix, out=after)
            if self.num_cut:
                self._blend_fragments(new, old)

    def _blend_fragments(self, new: torch.Tensor, old: torch.Tensor) -> None:
        # (C, largest d): this rank's contribution to every cut row, also of ranks that have no fragment.
        products = torch.zeros(self.num_cut, self.width, device=new.device)
        for fragment in self.fragments:
            update = new[fragment.flat_slice] - old[fragment.flat_slice]
            # A fragment of the row reaches all columns through its rows of P.
            products[fragment.index, : len(fragment.matrix)] += update @ fragment.matrix[fragment.columns]
        summed = all_reduce_sum(products.to(self.device)).to(new.device)
        for fragment in self.fragments:
            own = summed[fragment.index, fragment.columns]
            new[fragment.flat_slice] = old[fragment.flat_slice] + own


def build_direction_masks(
    shards: Iterable[Shard],
    flats: dict[str, torch.Tensor],
    widths: dict[str, int],
    projector: Callable[[str], torch.Tensor],
    device: torch.device,
) -> dict[torch.Tensor, DirectionMask]:
    """Flat tensor -> its mask, for all that hold a masked parameter on any rank; a collective.

    Args:
        shards: this rank's, without rows that are not masked.
        flats: parameter -> flat tensor that it lies in, also where this rank has no shard of it.
        widths: parameter -> d, of all that are masked, in the same order on every rank.
        projector: parameter -> P, float32, the same on every rank; called only for parameters that this rank has a
            shard of, since all together are as large as the model.
        device: where collectives run.
    """
    masked = [shard for shard in shards if shard.name in widths]
    cut_rows = _find_cut_rows([(shard.name, shard.param_start, shard.numel) for shard in masked], widths)
    masks: dict[torch.Tensor, DirectionMask] = {}
    # Every rank numbers the cut rows of a flat tensor in the same order.
    indices: dict[tuple[str, int], int] = {}
    for name, width in widths.items():
        flat = flats[name]
        mask = masks.setdefault(flat, DirectionMask(device, numel=flat.numel()))
        for row in cut_rows[name]:
            mask.width = max(mask.width, width)
            indices[name, row] = mask.num_cut
            mask.num_cut += 1
    matrices: dict[str, torch.Tensor] = {}
    for shard in masked:
        if shard.name not in matrices:
            matrices[shard.name] = projector(shard.name).to(shard.flat.device)
        mask = masks[shard.flat]
        mask.rows += _full_rows(shard, matrices[shard.name])
        mask.fragments += _row_fragments(shard, matrices[shard.name], indices)
    return masks


def _full_rows(shard: Shard, matrix: torch.Tensor) -> list[_FullRows]:
    """The rows that lie in a shard completely, none or one entry."""
    width = len(matrix)
    # In elements of the parameter: the first row that begins in the shard, and the end of the last that ends in it.
    begin = -(-shard.param_start // width) * width
    end = shard.param_span.stop // width * width
    return [_FullRows(_to_flat(shard, begin, end), matrix)] if begin < end else []


def _row_fragments(shard: Shard, matrix: torch.Tensor, indices: dict[tuple[str, int], int]) -> list[_RowFragment]:
    """The fragments of cut rows at the ends of a shard, at most two."""
    width = len(matrix)
    first_row = shard.param_start // width
    last_row = (shard.param_span.stop - 1) // width
    fragments = []
    for row in sorted({first_row, last_row}):
        begin = max(shard.param_start, row * width)
        end = min(shard.param_span.stop, (row + 1) * width)
        # Where masked rows end within a parameter, the shard ends with a full row that no rank continues.
        if (shard.name, row) in indices and end - begin < width:
            columns = slice(begin - row * width, end - row * width)
            fragments.append(_RowFragment(indices[shard.name, row], _to_flat(shard, begin, end), columns, matrix))
    return fragments


def _to_flat(shard: Shard, begin: int, end: int) -> slice:
    """Elements [begin, end) of the flattened parameter as a slice of the flat tensor."""
    distance = shard.flat_start - shard.param_start
    return slice(begin + distance, end + distance)


def _find_cut_rows(own: list[tuple[str, int, int]], widths: dict[str, int]) -> dict[str, list[int]]:
    """Parameter -> rows that shards of any rank end within, in the same order on every rank; a collective.

    Args:
        own: (parameter, first element, number of elements) of this rank's shards.
        widths: parameter -> d.
    """
    shards_by_rank: list[list[tuple[str, int, int]]] = [own]
    if world_size() > 1:
        shards_by_rank = [[] for _ in range(world_size())]
        with in_collective():
            dist.all_gather_object(shards_by_rank, own)
    cut: dict[str, set[int]] = {name: set() for name in widths}
    for shards in shards_by_rank:
        for name, start, numel in shards:
            width = widths[name]
            cut[name] |= {edge // width for edge in (start, start + numel) if edge % width}
    return {name: sorted(rows) for name, rows in cut.items()}
