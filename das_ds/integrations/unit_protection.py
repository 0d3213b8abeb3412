"""Protection by importance of units.

Shape legend: L layers, U units.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from das_ds.functional.importance import elementwise_maximum, importance_score, normalize_units
from das_ds.functional.units import UnitValues
from das_ds.integrations.network import Network
from das_ds.integrations.protection import BuiltMasks, Protection, Tensors
from das_ds.integrations.settings import ElementwiseSettings
from das_ds.integrations.steps import HookedSteps
from das_ds.softmask.apply import apply_masks, clear_masks, unit_masks
from das_ds.softmask.importance_file import load_unit_importance, save_unit_importance
from das_ds.softmask.measure import average_scores, gate_gradients


class UnitProtection(Protection):
    """Importance of every head, neuron and output, see `softmask.unit`."""

    def __init__(
        self, network: Network, steps: HookedSteps, tokens: Sequence[str], settings: ElementwiseSettings
    ) -> None:
        super().__init__(network, steps, tokens)
        self._settings = settings
        self._values: UnitValues | None = None

    @property
    def is_empty(self) -> bool:
        """See `Protection`."""
        return self._values is None

    def clear(self) -> None:
        """See `Protection`."""
        self._values = None

    def measure(self, dataloader: Iterable[Any]) -> None:
        """EMax with normalized mean scores of the gates' gradients, one for each row of a batch."""
        network = self.network
        sums: UnitValues = {}
        totals = torch.zeros(2, dtype=torch.float64, device=network.device)
        with network.evaluating():
            for batch, counts in network.batches(dataloader):
                weights = torch.full((network.num_sequences(batch),), float(counts), device=network.device)
                scores, losses = gate_gradients(
                    network.gates, network.layout, weights, partial(network.sequence_losses, batch)
                )
                self.steps.release_gathered()
                for group, values in scores.items():
                    # (L, 1, U): batches may have different numbers of rows.
                    score = importance_score(values, 1.0, self._settings.importance.score).sum(dim=1, keepdim=True)
                    sums[group] = score + sums.get(group, 0.0)
                totals += torch.stack((weights, weights * losses)).sum(dim=1)
        latest = normalize_units(average_scores(sums, totals), self._settings.importance)
        self._values = elementwise_maximum(latest, self._values)

    def apply(self) -> None:
        """Multiply updates or gradients by 1 - I."""
        values = self._values
        if values is None:
            clear_masks(self.steps)
            return
        masks = BuiltMasks(lambda softmask: unit_masks(self.steps, self.network.layout, values, softmask))
        apply_masks(self.steps, masks, self._settings.softmask, apply_to=self._settings.softmask.apply_to)

    def save(self, path: Path) -> None:
        """See `importance_file`."""
        values = self._values
        assert values is not None, "something is protected"
        self.steps.ranks.run_on_main(lambda: save_unit_importance(path, values, self.network.layout, self.tokens))

    def load(self, path: Path) -> None:
        """See `importance_file`."""
        loaded = load_unit_importance(path, self.network.layout, self.tokens or None)
        self._values = {group: values.to(self.network.device) for group, values in loaded.items()}

    def tensors(self) -> Tensors:
        """Group -> (L, U)."""
        assert self._values is not None, "something is protected"
        return {group: values.cpu().clone() for group, values in self._values.items()}

    def load_tensors(self, tensors: Tensors, num_tokens: int | None = None) -> None:
        """Equal on every rank."""
        layout = self.network.layout
        self._check_shapes(tensors, {group: (layout.num_layers, units) for group, units in layout.num_units.items()})
        self._values = {group: values.to(self.network.device).clone() for group, values in tensors.items()}
