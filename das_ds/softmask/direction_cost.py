"""What a mask of directions costs one rank in a step, counted from its layout without running it.

Shape legend: n vectors, d elements of each, k numbers of a projector's code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from das_ds.functional.projectors import ProjectorSize
from das_ds.softmask.cut_vectors import CutVectors
from das_ds.softmask.mask_layout import MaskLayout
from das_ds.softmask.projection import num_vectors_at_once

FP32 = 4
"""Bytes; products are computed in float32."""


@dataclass(frozen=True)
class MaskCost:
    """Of one pass over all vectors: one per step for a mask of gradients or of updates, one more for weight decay."""

    flop: int
    """2 n d^2 with a dense projector, 4 n d k with one of rank k."""
    memory_bytes: int
    """Read and written on the device: vectors, their products, and a projector for each product."""
    sent_bytes: int
    """To other ranks, as many as from them, in two exchanges together."""
    num_exchanges: int
    """The same on every rank."""
    num_peers: int
    """Other ranks that this one communicates with."""
    num_products: int
    """Launches of matrix products, or of pairs of them."""
    projector_bytes: int
    """Of the projectors that the rank's vectors need."""
    scratch_bytes: int
    """The most that exists at a time, freed after the pass."""


def count_mask_cost(
    layout: MaskLayout, projectors: Mapping[str, ProjectorSize], *, rank: int, element_bytes: int
) -> MaskCost:
    """Cost of a layout on one rank.

    Args:
        layout: of the rank.
        projectors: input -> its size, of all inputs.
        rank: whose layout it is.
        element_bytes: of a gradient, or of an update (4).
    """
    products = list(_products(layout))
    num_elements = sum(vectors * projectors[name].width for name, vectors in products)
    product_bytes = FP32 + FP32 + element_bytes
    largest_product = max((vectors * projectors[name].width for name, vectors in products), default=0)
    return MaskCost(
        flop=sum(vectors * flop_of_vector(projectors[name]) for name, vectors in products),
        memory_bytes=2 * num_elements * element_bytes + sum(projectors[name].num_bytes for name, _ in products),
        sent_bytes=element_bytes * sum(_sent_to_others(cut, rank) for cut in layout.rounds),
        num_exchanges=2 * len(layout.rounds),
        num_peers=len({peer for cut in layout.rounds for peer in _peers(cut, rank)}),
        num_products=len(products),
        projector_bytes=sum(projectors[name].num_bytes for name in {name for name, _ in products}),
        scratch_bytes=product_bytes * largest_product + _exchange_bytes(layout.rounds, element_bytes),
    )


def _products(layout: MaskLayout) -> Iterator[tuple[str, int]]:
    """(input, vectors) of every product."""
    for batch in layout.batches:
        yield batch.input, batch.num_vectors
    for cut in layout.rounds:
        for name, num_vectors in cut.num_vectors.items():
            at_once = num_vectors_at_once(cut.widths[name])
            for first in range(0, num_vectors, at_once):
                yield name, min(at_once, num_vectors - first)


def flop_of_vector(projector: ProjectorSize) -> int:
    """2 d^2 with a dense projector, 4 d k with one of rank k."""
    is_dense = projector.code_width == projector.width
    return 2 * projector.width**2 if is_dense else 4 * projector.width * projector.code_width


def _sent_to_others(cut: CutVectors, rank: int) -> int:
    """Elements, there and back."""
    own = cut.send_sizes[rank] + cut.receive_sizes[rank]
    return sum(cut.send_sizes) + sum(cut.receive_sizes) - own


def _peers(cut: CutVectors, rank: int) -> Iterator[int]:
    for peer, sizes in enumerate(zip(cut.send_sizes, cut.receive_sizes, strict=True)):
        if peer != rank and any(sizes):
            yield peer


def _exchange_bytes(rounds: Iterable[CutVectors], element_bytes: int) -> int:
    """Largest of all rounds: fragments sent, fragments received, complete vectors, fragments returned."""
    sizes = (2 * sum(cut.send_sizes) + 2 * sum(cut.receive_sizes) for cut in rounds)
    return element_bytes * max(sizes, default=0)
