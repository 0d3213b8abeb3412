"""Masked matrices: the parts of parameters that multiply an input, and which input that is.

Shape legend: d width of an input, o of an output.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MaskedMatrix:
    """One matrix W of a parameter, by which a layer multiplies an input x (d,): y = W x.

    A parameter is one such matrix, or several in a row, one for each expert.
    """

    name: str
    """The parameter's name; with the expert's number in brackets where the parameter holds several matrices."""
    parameter: str
    start: int
    """First element of the matrix in the flattened parameter."""
    num_outputs: int
    """o; without rows of tokens that were added since the input was measured."""
    width: int
    """d."""
    input: str
    """Name of the input. Matrices that read the same input (queries, keys, values; gate, up) share its moment and its
    projector."""
    transposed: bool = False
    """Whether the matrix is stored as (d, o), as in `transformers.pytorch_utils.Conv1D`, and not as (o, d)."""

    @property
    def numel(self) -> int:
        """Number of its elements."""
        return self.num_outputs * self.width
