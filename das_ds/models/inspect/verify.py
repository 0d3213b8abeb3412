"""Whether a table is right: what only makes or only reads a unit cannot matter while the unit's gate is closed.

Every group is tried in every layer with some units. With their gates at zero, every entry that the table gives to them
alone must have no gradient, and every other row or column that loses its gradient must be known to the table as theirs.

Shape legend: E blocks of R rows and C columns of a parameter, U units of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from das_ds.functional.units import UnitLayout
from das_ds.models.architectures.spec import ArchitectureSpec
from das_ds.models.gates import UnitGates
from das_ds.models.inspect.probe import probe_ids
from das_ds.models.language_model import LanguageModel

NOTHING = 1e-6
"""Share of the median gradient below which a gradient is rounding."""

Gradients = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Parameter -> largest absolute gradient of every row (E * R,) and of every column (E * C,)."""


def verify_table(model: PreTrainedModel, spec: ArchitectureSpec) -> dict[str, tuple[str, ...]]:
    """Close gates of a small network and look at the gradients.

    What has no gradient in the first place, such as the bias of a key projection, which a softmax ignores, tells
    nothing and passes.

    Args:
        model: in evaluation mode, small enough for some dozen forward and backward passes.
        spec: its architecture spec.

    Returns:
        Group -> what contradicts the table; empty for a right one.

    Raises:
        ModelError: the table does not even fit the model's names and shapes.
    """
    layout = spec.layout(model)
    trial = _GateExperiment(model, spec, layout)
    problems: dict[str, list[str]] = {}
    for group in layout.num_units:
        for layer in range(layout.num_layers):
            for units in _unit_sets(layout, group, layer):
                found = trial.contradictions(group, layer, units)
                problems.setdefault(group, []).extend(found)
    return {group: tuple(dict.fromkeys(found)) for group, found in problems.items() if found}


def broken_vectors(
    model: PreTrainedModel, spec: ArchitectureSpec, group: str, units: list[int]
) -> dict[str, torch.Tensor]:
    """Which entries of vectors lose their gradient when single units of the first layer are closed.

    Returns:
        Parameter -> (len(units), A) bool; parameters that lose none are left out.
    """
    trial = _GateExperiment(model, spec, spec.layout(model))
    lost = [trial.lost(trial.gradients((group, 0, (unit,)))) for unit in units]
    vectors = [name for name, parameter in model.named_parameters() if parameter.dim() == 1]
    found = {name: torch.stack([rows[name][0] for rows in lost]) for name in vectors}
    return {name: entries for name, entries in found.items() if entries.any()}


def _unit_sets(layout: UnitLayout, group: str, layer: int) -> list[tuple[int, ...]]:
    """The first, second and last unit alone, and together those that share an entry."""
    size = layout.num_units[group]
    sets: list[tuple[int, ...]] = [(unit,) for unit in sorted({0, min(1, size - 1), size - 1})]
    for item in layout.ownerships:
        if item.group == group and item.layer == layer:
            for owners in (item.units[0], item.units[-1]):
                sets.append(tuple(sorted({int(unit) for unit in owners if unit >= 0})))
    return [units for units in dict.fromkeys(sets) if units and len(units) < size]


@dataclass
class _GateExperiment:
    model: PreTrainedModel
    spec: ArchitectureSpec
    layout: UnitLayout

    def __post_init__(self) -> None:
        self._wrapped = LanguageModel(self.model, self.spec)
        self._gates = UnitGates(self.model, self.spec)
        opened = self.gradients(None)
        nothing = NOTHING * torch.stack([rows.max() for rows, _ in opened.values()]).median()
        # What closed gates cut off is exactly zero; what was never there is only as good as zero.
        self._moves = {name: tuple(axis > nothing for axis in axes) for name, axes in opened.items()}

    def contradictions(self, group: str, layer: int, units: tuple[int, ...]) -> list[str]:
        """What the gradients with these units closed say against the table."""
        found = []
        closed = self.gradients((group, layer, units))
        known: dict[tuple[str, int], torch.Tensor] = {}
        unit = ", ".join(map(str, units))
        for item in self.layout.ownerships:
            if item.group != group or item.layer != layer:
                continue
            theirs = torch.isin(item.units, torch.tensor(units))
            alone = theirs.any(dim=1) & (theirs | (item.units < 0)).all(dim=1)
            known[item.parameter, item.axis] = theirs.any(dim=1)
            after, before = closed[item.parameter][item.axis], self._moves[item.parameter][item.axis]
            if not item.consumer and bool((after[alone & before] != 0).any()):
                found.append(
                    f"{item.parameter}: axis {item.axis} still has a gradient where {group} {unit} of layer {layer}, "
                    "closed, owns it"
                )
        for name, axes in self.lost(closed).items():
            for axis, entries in enumerate(axes):
                lost = entries & ~known.get((name, axis), torch.zeros_like(entries))
                other = known.get((name, 1 - axis))
                # Where all of the other axis belongs to the closed units, this one has nothing left.
                if bool(lost.any()) and not (other is not None and bool(other.all())):
                    found.append(
                        f"{name}: {int(lost.sum())} entries of axis {axis} lose their gradient when {group} {unit} of "
                        f"layer {layer} is closed, and the table does not give them to it"
                    )
        return found

    def lost(self, closed: Gradients) -> dict[str, tuple[torch.Tensor, ...]]:
        """Parameter -> bool for every row and for every column: has a gradient, but none with these gates closed."""
        return {
            name: tuple((after == 0) & before for after, before in zip(axes, self._moves[name], strict=True))
            for name, axes in closed.items()
        }

    def gradients(self, closed: tuple[str, int, tuple[int, ...]] | None) -> Gradients:
        """With the gates of (group, layer, units) at zero, or all open."""
        ids = probe_ids(self.model)
        gates = {group: torch.ones(self.layout.num_layers, 1, units) for group, units in self.layout.num_units.items()}
        if closed is not None:
            group, layer, units = closed
            gates[group][layer, :, list(units)] = 0.0
        generator = torch.Generator().manual_seed(1)
        with self._gates.active(gates, num_rows=len(ids)):
            hidden, losses = self._wrapped(ids, torch.arange(ids.numel()), ids.flatten().roll(1))
            noise = torch.randn(hidden.shape, generator=generator)
            loss = losses.sum() + (hidden * noise).sum()
            names, parameters = zip(*self.model.named_parameters(), strict=True)
            gradients = torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True)
        found = {}
        for name, gradient in zip(names, gradients, strict=True):
            size = gradient.abs().reshape(self.layout.shapes[name])
            found[name] = size.amax(dim=2).flatten(), size.amax(dim=1).flatten()
        return found
