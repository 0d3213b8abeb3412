"""Low-rank adapters of linear maps, W = W0 + s B A, and which of their rows and columns units own.

Shape legend: r rank; I inputs, O outputs of the map; A is (r, I), B is (O, r).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from das_ds.functional.units import Ownership, UnitLayout, block_shape


@dataclass(frozen=True)
class LowRankMap:
    """One adapted linear map by the names of its parameters."""

    weight: str
    """W0 in the network without adapters."""
    a: str
    """A in the network with adapters."""
    b: str
    """B in the network with adapters."""
    rank: int
    num_inputs: int
    num_outputs: int
    transposed: bool
    """W0 is stored (I, O) as in GPT-2's Conv1D and not (O, I)."""

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """A and B -> (E, R, C)."""
        return {
            self.a: block_shape((self.rank, self.num_inputs)),
            self.b: block_shape((self.num_outputs, self.rank)),
        }


def adapted_layout(layout: UnitLayout, maps: Iterable[LowRankMap]) -> UnitLayout:
    """The structure of a network of which only the adapters are trained.

    An output of W is a row of B and an input of W is a column of A, along an axis of the same length, so what owns or
    reads the one owns or reads the other. A where only outputs are owned, and B where only inputs are, belong to all
    units together and thus to none. What is not adapted is frozen and needs no protection.
    """
    by_weight = {item.weight: item for item in maps}
    return replace(
        layout,
        ownerships=tuple(
            _on_adapter(item, by_weight[item.parameter]) for item in layout.ownerships if item.parameter in by_weight
        ),
        shapes={name: shape for item in by_weight.values() for name, shape in item.shapes.items()},
        vocabulary=frozenset(),
        adapted=layout.ownerships,
    )


def merged(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, *, transposed: bool) -> torch.Tensor:
    """W0 + s B A in float32.

    Args:
        weight: W0, (O, I), or (I, O) where `transposed`.
        a: (r, I).
        b: (O, r).
        scale: s.
        transposed: how W0 and the result are stored.
    """
    update = scale * (b.float() @ a.float())
    return weight.float() + (update.T if transposed else update)


def _on_adapter(item: Ownership, adapted: LowRankMap) -> Ownership:
    owns_outputs = (item.axis == 1) if adapted.transposed else (item.axis == 0)
    return replace(item, parameter=adapted.b if owns_outputs else adapted.a, axis=0 if owns_outputs else 1)
