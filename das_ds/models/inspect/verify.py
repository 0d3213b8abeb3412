"""Step 2, verify: while the gates of units are closed, exactly the weights that belong to them have no gradient.

Every group is tested in every layer with some units. With their gates at zero, every entry that the spec assigns to
them alone must have no gradient, and every other row or column that loses its gradient must be assigned to them too.

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

ROUNDING = 1e-6
"""Fraction of the median gradient below which a gradient counts as rounding."""

Gradients = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Parameter -> largest absolute gradient of every row (E * R,) and of every column (E * C,)."""


def verify_table(model: PreTrainedModel, spec: ArchitectureSpec) -> dict[str, tuple[str, ...]]:
    """Close gates of a small network and compare its gradients with the spec.

    A parameter without a gradient in the first place, such as the bias of a key projection, which the softmax cancels,
    passes untested.

    Args:
        model: in evaluation mode, small enough for some dozen forward and backward passes.
        spec: its architecture spec.

    Returns:
        Group -> contradictions; empty if there are none.

    Raises:
        ModelError: the spec does not fit the model's names and shapes.
    """
    layout = spec.layout(model)
    experiment = _GateExperiment(model, spec, layout)
    problems: dict[str, list[str]] = {}
    for group in layout.num_units:
        for layer in range(layout.num_layers):
            for units in _choose_unit_sets(layout, group, layer):
                problems.setdefault(group, []).extend(experiment.find_contradictions(group, layer, units))
    return {group: tuple(dict.fromkeys(texts)) for group, texts in problems.items() if texts}


def broken_vectors(
    model: PreTrainedModel, spec: ArchitectureSpec, group: str, units: list[int]
) -> dict[str, torch.Tensor]:
    """Which entries of 1-D parameters lose their gradient when single units of the first layer are closed.

    Returns:
        Parameter -> (len(units), A) bool; parameters that lose none are omitted.
    """
    experiment = _GateExperiment(model, spec, spec.layout(model))
    broken_by_unit = [experiment.find_broken(experiment.gradients((group, 0, (unit,)))) for unit in units]
    vectors = [name for name, parameter in model.named_parameters() if parameter.dim() == 1]
    broken = {name: torch.stack([by_name[name][0] for by_name in broken_by_unit]) for name in vectors}
    return {name: entries for name, entries in broken.items() if entries.any()}


def _choose_unit_sets(layout: UnitLayout, group: str, layer: int) -> list[tuple[int, ...]]:
    """Units to close together: the first, second and last unit alone, and units that share an entry."""
    size = layout.num_units[group]
    sets: list[tuple[int, ...]] = [(unit,) for unit in sorted({0, min(1, size - 1), size - 1})]
    for item in layout.ownerships:
        if item.group == group and item.layer == layer:
            for owners in (item.units[0], item.units[-1]):
                sets.append(tuple(sorted({int(unit) for unit in owners if unit >= 0})))
    return [units for units in dict.fromkeys(sets) if units and len(units) < size]


@dataclass
class _GateExperiment:
    """Gradients of one loss with chosen gates closed, compared with those with all gates open."""

    model: PreTrainedModel
    spec: ArchitectureSpec
    layout: UnitLayout

    def __post_init__(self) -> None:
        self._wrapped = LanguageModel(self.model, self.spec)
        self._gates = UnitGates(self.model, self.spec)
        open_gradients = self.gradients(None)
        threshold = ROUNDING * torch.stack([rows.max() for rows, _ in open_gradients.values()]).median()
        # A closed gate makes gradients exactly zero; one that vanishes by itself is only nearly zero.
        self._has_gradient = {name: tuple(axis > threshold for axis in axes) for name, axes in open_gradients.items()}

    def find_contradictions(self, group: str, layer: int, units: tuple[int, ...]) -> list[str]:
        """Where the gradients with these units closed contradict the spec."""
        contradictions = []
        closed = self.gradients((group, layer, units))
        assigned: dict[tuple[str, int], torch.Tensor] = {}
        unit = ", ".join(map(str, units))
        for item in self.layout.ownerships:
            if item.group != group or item.layer != layer:
                continue
            is_closed = torch.isin(item.units, torch.tensor(units))  # per entry and owner, (entries, N)
            assigned[item.parameter, item.axis] = is_closed.any(dim=1)
            # Entries all of whose owners are closed; unused owner slots are negative.
            alone = is_closed.any(dim=1) & (is_closed | (item.units < 0)).all(dim=1)
            after = closed[item.parameter][item.axis]
            before = self._has_gradient[item.parameter][item.axis]
            if not item.consumer and bool((after[alone & before] != 0).any()):
                contradictions.append(
                    f"{item.parameter}: axis {item.axis} still has a gradient where {group} {unit} of layer {layer}, "
                    "closed, owns it"
                )
        for name, axes in self.find_broken(closed).items():
            for axis, entries in enumerate(axes):
                unassigned = entries & ~assigned.get((name, axis), torch.zeros_like(entries))
                other = assigned.get((name, 1 - axis))
                # If the closed units own the other axis completely, no gradient is left for this one.
                if bool(unassigned.any()) and not (other is not None and bool(other.all())):
                    contradictions.append(
                        f"{name}: {int(unassigned.sum())} entries of axis {axis} lose their gradient when {group} "
                        f"{unit} of layer {layer} is closed, but the table does not assign them to it"
                    )
        return contradictions

    def find_broken(self, closed: Gradients) -> dict[str, tuple[torch.Tensor, ...]]:
        """Parameter -> bool for every row and for every column: has a gradient, but none with these gates closed."""
        return {
            name: tuple((after == 0) & before for after, before in zip(axes, self._has_gradient[name], strict=True))
            for name, axes in closed.items()
        }

    def gradients(self, closed: tuple[str, int, tuple[int, ...]] | None) -> Gradients:
        """Gradients with the gates of (group, layer, units) at zero; None: all open."""
        ids = probe_ids(self.model)
        gates = {group: torch.ones(self.layout.num_layers, 1, units) for group, units in self.layout.num_units.items()}
        if closed is not None:
            group, layer, units = closed
            gates[group][layer, :, list(units)] = 0.0
        generator = torch.Generator().manual_seed(1)
        with self._gates.active(gates, num_rows=len(ids)):
            # The loss reaches every parameter: the LM head by the cross-entropy, the rest also by a random projection.
            hidden, losses = self._wrapped(ids, torch.arange(ids.numel()), ids.flatten().roll(1))
            noise = torch.randn(hidden.shape, generator=generator)
            loss = losses.sum() + (hidden * noise).sum()
            names, parameters = zip(*self.model.named_parameters(), strict=True)
            gradients = torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True)
        largest: Gradients = {}
        for name, gradient in zip(names, gradients, strict=True):
            size = gradient.abs().reshape(self.layout.shapes[name])  # (E, R, C)
            largest[name] = (size.amax(dim=2).flatten(), size.amax(dim=1).flatten())
        return largest
