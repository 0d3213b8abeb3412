"""Hidden matrices: the weights of attention and MLPs as they are stored, of a network or of one that is only planned.

Neither a pass through the network nor its weights are needed: the units of the architecture's table are enough.
"""

from __future__ import annotations

from dataclasses import dataclass

from das_ds.functional.units import HEAD, INTERMEDIATE, UnitLayout
from das_ds.softmask.masked_matrix import MaskedMatrix


@dataclass(frozen=True)
class HiddenMatrix:
    """A matrix of a parameter, which is one such matrix or several in a row, one for each expert."""

    name: str
    """The parameter's name; with the expert's number in brackets where the parameter holds several matrices."""
    parameter: str
    start: int
    """First element in the flattened parameter."""
    num_rows: int
    """As it is stored: outputs, or inputs where it is stored transposed."""
    num_columns: int

    @property
    def numel(self) -> int:
        """Number of its elements."""
        return self.num_rows * self.num_columns

    def as_vector(self) -> MaskedMatrix:
        """All of it as the one vector of a masked matrix: ranks that share it complete it on one of them."""
        return MaskedMatrix(self.name, self.parameter, self.start, 1, self.numel, self.name)


def find_hidden_matrices(layout: UnitLayout) -> list[HiddenMatrix]:
    """Every matrix that heads or the neurons of an MLP have rows or columns of, in the order of the parameters.

    Those are queries, keys, values and the output of attention, separate or fused; up, gate and down projections; each
    expert's. Not among them are embeddings, LM heads, routers and adapters.

    Args:
        layout: of the network, without adapters.
    """
    owned = {item.parameter for item in layout.ownerships if item.group in (HEAD, INTERMEDIATE)}
    found = []
    for parameter, (num_blocks, num_rows, num_columns) in layout.shapes.items():
        if parameter not in owned or min(num_rows, num_columns) == 1:
            continue
        for number in range(num_blocks):
            name = parameter if num_blocks == 1 else f"{parameter}[{number}]"
            start = number * num_rows * num_columns
            found.append(HiddenMatrix(name, parameter, start, num_rows, num_columns))
    return found
