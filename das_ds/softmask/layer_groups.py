"""Layer groups: which kind of layer reads an input, from the tables of architectures."""

from __future__ import annotations

from collections.abc import Iterable

from das_ds.functional.units import HEAD, INTERMEDIATE, UnitLayout
from das_ds.models.lora import Lora
from das_ds.softmask.masked_matrix import MaskedMatrix

ATTENTION_INPUT = "attention input"
ATTENTION_OUTPUT = "attention output"
MLP_INPUT = "MLP input"
MLP_OUTPUT = "MLP output"
ADAPTER = "inside adapters"
OTHER = "LM head and others"
LAYER_GROUPS = (ATTENTION_INPUT, ATTENTION_OUTPUT, MLP_INPUT, MLP_OUTPUT, ADAPTER, OTHER)
"""In the order in which they are reported."""


def layer_groups(matrices: Iterable[MaskedMatrix], layout: UnitLayout, lora: Lora | None = None) -> dict[str, str]:
    """Input -> the kind of layer that reads it, sorted by `LAYER_GROUPS`.

    A matrix whose outputs are those of attention heads reads the attention's input, one whose inputs are those of heads
    reads its output; likewise with the neurons of an MLP. Adapters belong to the layer that they adapt: A reads its
    input, and B what A returns. Whatever no such unit owns (LM head, routers of experts, tables) is `OTHER`. Where
    several kinds of layers read one input, the first of `LAYER_GROUPS` counts.

    Args:
        matrices: all that are masked.
        layout: units of the network.
        lora: its adapters.
    """
    sides = _sides(layout)
    linears = () if lora is None else lora.linears
    adapted = {linear.a: (linear.weight, linear.transposed) for linear in linears}
    inner = {linear.b for linear in linears}
    found: dict[str, str] = {}
    for matrix in matrices:
        if matrix.parameter in inner:
            group = ADAPTER
        else:
            weight, transposed = adapted.get(matrix.parameter, (matrix.parameter, matrix.transposed))
            group = _group_of(sides.get(weight, set()), transposed)
        found[matrix.input] = min(found.get(matrix.input, OTHER), group, key=LAYER_GROUPS.index)
    return dict(sorted(found.items(), key=lambda item: LAYER_GROUPS.index(item[1])))


def _sides(layout: UnitLayout) -> dict[str, set[tuple[str, int]]]:
    """Parameter -> the groups of units that it has an axis of, with that axis."""
    sides: dict[str, set[tuple[str, int]]] = {}
    for item in layout.ownerships if layout.adapted is None else layout.adapted:
        sides.setdefault(item.parameter, set()).add((item.group, item.axis))
    return sides


def _group_of(sides: set[tuple[str, int]], transposed: bool) -> str:
    output_axis = 1 if transposed else 0
    by_side = {
        (HEAD, 1 - output_axis): ATTENTION_OUTPUT,
        (INTERMEDIATE, 1 - output_axis): MLP_OUTPUT,
        (HEAD, output_axis): ATTENTION_INPUT,
        (INTERMEDIATE, output_axis): MLP_INPUT,
    }
    return next((group for side, group in by_side.items() if side in sides), OTHER)
