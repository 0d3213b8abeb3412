"""Chunks of a flat tensor that are stepped and masked one by one, so that no vector a rank has completely is divided.

Shape legend: F elements of a flat tensor, d elements of a vector.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from das_ds.distributed.state import Shard
from das_ds.softmask.fragments import Fragment
from das_ds.softmask.mask_layout import Batch, MaskLayout, PlacedBlock, make_batches
from das_ds.softmask.matrix_blocks import Block

MAX_CHUNK_ELEMENTS = 1 << 22
"""Elements that are stepped and masked at once, unless a vector, or a transposed matrix, has more: 16 MiB in float32
for the old values, and as much for the update, the product and its copy."""


@dataclass
class UpdateChunk:
    """What a chunk of the flat tensor contains of masked matrices."""

    span: slice
    batches: list[Batch] = field(default_factory=list)
    """Complete vectors."""
    fragments: list[Fragment] = field(default_factory=list)


def plan_chunks(shards: Sequence[Shard], layout: MaskLayout, numel: int) -> list[UpdateChunk]:
    """Chunks in order and without gaps, of at most `MAX_CHUNK_ELEMENTS` where vectors and transposed matrices allow it.

    Args:
        shards: this rank's in the flat tensor.
        layout: of the same shards.
        numel: F.
    """
    complete = [placed for batch in layout.batches for placed in batch.blocks]
    fragments = [fragment for cut in layout.rounds for fragment in cut.sent]
    atoms = [_atom(shards[placed.shard], placed.block) for placed in complete]
    atoms += [_atom(shards[fragment.shard], fragment.block) for fragment in fragments]
    spans = list(_divide(_fill_gaps(_merge(atoms), numel)))
    chunks = [UpdateChunk(span) for span in spans]
    starts = [span.start for span in spans]
    for fragment in fragments:
        begin = _atom(shards[fragment.shard], fragment.block).begin
        chunks[bisect_right(starts, begin) - 1].fragments.append(fragment)
    blocks: list[list[PlacedBlock]] = [[] for _ in spans]
    for placed in complete:
        for number, block in _divide_block(shards[placed.shard], placed.block, spans, starts):
            blocks[number].append(PlacedBlock(placed.shard, block))
    for chunk, in_chunk in zip(chunks, blocks, strict=True):
        chunk.batches = make_batches(in_chunk)
    return chunks


@dataclass(frozen=True)
class _Atom:
    """A range of the flat tensor that may be divided only at multiples of `step` elements."""

    begin: int
    end: int
    step: int


def _atom(shard: Shard, block: Block) -> _Atom:
    """From the first element of a block to its last."""
    distance = shard.flat_start - shard.param_start + block.matrix.start
    corners = [
        (vector * block.matrix.width + column)
        if not block.matrix.transposed
        else (column * block.matrix.num_outputs + vector)
        for vector, column in ((block.vectors[0], block.columns[0]), (block.vectors[-1], block.columns[-1]))
    ]
    begin = distance + corners[0]
    end = distance + corners[1] + 1
    divisible = block.is_complete and not block.matrix.transposed
    return _Atom(begin, end, block.matrix.width if divisible else end - begin)


def _merge(atoms: Iterable[_Atom]) -> list[_Atom]:
    """Atoms in order; those that overlap, blocks of one transposed matrix, as one that may not be divided."""
    merged: list[_Atom] = []
    for atom in sorted(atoms, key=lambda atom: atom.begin):
        if merged and atom.begin < merged[-1].end:
            begin = merged[-1].begin
            end = max(merged[-1].end, atom.end)
            merged[-1] = _Atom(begin, end, end - begin)
        else:
            merged.append(atom)
    return merged


def _fill_gaps(atoms: list[_Atom], numel: int) -> Iterator[_Atom]:
    """The atoms, and what lies between them, which may be divided anywhere."""
    position = 0
    for atom in atoms:
        if position < atom.begin:
            yield _Atom(position, atom.begin, 1)
        yield atom
        position = atom.end
    if position < numel:
        yield _Atom(position, numel, 1)


def _divide(atoms: Iterable[_Atom]) -> Iterator[slice]:
    begin = 0
    end = 0
    for atom in atoms:
        while end < atom.end:
            room = (MAX_CHUNK_ELEMENTS - (end - begin)) // atom.step * atom.step
            if room <= 0 and end > begin:
                yield slice(begin, end)
                begin = end
                continue
            end = min(end + max(room, atom.step), atom.end)
    if end > begin:
        yield slice(begin, end)


def _divide_block(
    shard: Shard, block: Block, spans: Sequence[slice], starts: Sequence[int]
) -> Iterator[tuple[int, Block]]:
    """(number of a chunk, the vectors of a complete block that lie in it)."""
    atom = _atom(shard, block)
    first = bisect_right(starts, atom.begin) - 1
    if block.matrix.transposed:
        yield first, block
        return
    for number in range(first, len(spans)):
        begin = max(spans[number].start, atom.begin)
        end = min(spans[number].stop, atom.end)
        if begin >= end:
            return
        vectors = range((begin - atom.begin) // atom.step, (end - atom.begin) // atom.step)
        yield number, block.with_vectors(block.vectors[vectors.start : vectors.stop])
