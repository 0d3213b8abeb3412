"""Importance of units: heads, neurons and outputs (Ke et al., ICLR 2023). Equal on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from das_ds.config import SoftmaskConfig
from das_ds.context import DomainContext
from das_ds.distributed.state import ComponentState, SavedComponentState
from das_ds.functional.importance import elementwise_maximum, normalize_units
from das_ds.functional.units import UnitValues
from das_ds.softmask.importance import ImportanceLevel
from das_ds.softmask.importance_file import load_unit_importance, save_unit_importance
from das_ds.softmask.measure import ImportanceLoss, measure_unit_importance


class UnitLevel(ImportanceLevel[UnitValues]):
    """Group -> (L, U); keeps (heads + intermediate + hidden) numbers per layer."""

    def measure(self, domain: DomainContext, label: str, loss: ImportanceLoss) -> UnitValues:
        """One forward and backward pass over the sample, gradients of the gates only."""
        settings = self.run.config.method.importance
        raw = measure_unit_importance(self.run, domain.sample_batches(label), loss, settings.score)
        return normalize_units(raw, settings)

    def maximum(self, new: UnitValues, accumulated: UnitValues | None) -> UnitValues:
        """EMax per unit."""
        return elementwise_maximum(new, accumulated)

    def by_unit(self, importance: UnitValues) -> UnitValues:
        """Itself."""
        return importance

    def protect(self, importance: UnitValues, softmask: SoftmaskConfig) -> None:
        """Mask by rows and columns."""
        self.soft_masks.protect_units(self.run.layout, importance, softmask)

    def state(self, importance: UnitValues) -> ComponentState:
        """Equal on every rank."""
        return ComponentState(shared=importance)

    def load_state(self, saved: SavedComponentState) -> UnitValues:
        """On the run's device."""
        device = self.run.engine.ranks.info.device
        return {group: values.to(device) for group, values in saved.shared().items()}

    def write(self, path: Path, importance: UnitValues, tokens: Sequence[str]) -> None:
        """Every rank has the same."""
        layout = self.run.layout
        self.run.engine.ranks.run_on_main(lambda: save_unit_importance(path, importance, layout, tokens))

    def read(self, path: Path) -> UnitValues:
        """Load on the run's device."""
        device = self.run.engine.ranks.info.device
        importance = load_unit_importance(path, self.run.layout, self.run.tokens)
        return {group: values.to(device) for group, values in importance.items()}
