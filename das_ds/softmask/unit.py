"""Unit importance: heads, neurons and outputs (Ke et al., ICLR 2023). Equal on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from das_ds.config import ImportanceConfig, SoftmaskConfig
from das_ds.context import DomainContext, RunContext
from das_ds.distributed.state import ComponentState, SavedComponentState
from das_ds.engine.mask import ElementwiseMasks
from das_ds.functional.importance import elementwise_maximum, normalize_units
from das_ds.functional.units import UnitValues
from das_ds.models.size import FP32, MemoryUse, ModelSize, Sharding
from das_ds.softmask.apply import unit_masks
from das_ds.softmask.importance_file import load_unit_importance, save_unit_importance
from das_ds.softmask.measure import ImportanceLoss, measure_unit_importance


class UnitImportance:
    """One value per unit: (heads + intermediate + hidden) numbers per layer. See `softmask.importance.Importance`.

    Args:
        run: the engine and its units.
        values: group -> (L, U) float32 in [0, 1] on the device.
    """

    def __init__(self, run: RunContext, values: UnitValues) -> None:
        self.run = run
        self.values = values

    @classmethod
    def measure(
        cls, run: RunContext, domain: DomainContext, label: str, loss: ImportanceLoss, settings: ImportanceConfig
    ) -> UnitImportance:
        """One forward and backward pass over the sample, gradients of the gates only."""
        raw = measure_unit_importance(run, domain.sample_batches(label), loss, settings.score)
        return cls(run, normalize_units(raw, settings))

    @classmethod
    def memory(cls, size: ModelSize, sharding: Sharding, *, has_own_mask: bool) -> MemoryUse:
        """4 bytes a unit, on every rank; masks are made from the importance as it is."""
        importance = FP32 * size.num_units
        return MemoryUse(
            optimizer={"importance": 3 * importance},
            checkpoint=2 * importance,
            domain=importance,
            # Importance of general knowledge, and the accumulated one.
            run=2 * importance,
            measurement="backward",
        )

    def accumulate(self, earlier: UnitImportance | None) -> UnitImportance:
        """EMax per unit."""
        values = None if earlier is None else earlier.values
        return UnitImportance(self.run, elementwise_maximum(self.values, values))

    def masks(self, settings: SoftmaskConfig) -> ElementwiseMasks:
        """By rows and columns, in memory that does not grow with the weights."""
        return unit_masks(self.run.engine, self.run.layout, self.values, settings)

    def unit_gates(self) -> UnitValues:
        """The values themselves."""
        return self.values

    def state_dict(self) -> ComponentState:
        """Equal on every rank."""
        return ComponentState(replicated=self.values)

    @classmethod
    def load_state_dict(cls, run: RunContext, saved: SavedComponentState) -> UnitImportance:
        """On the run's device."""
        return cls(run, _to_device(run, saved.replicated()))

    def save(self, path: Path, tokens: Sequence[str]) -> None:
        """Rank 0 writes; all ranks have equal values."""
        ranks = self.run.engine.ranks
        ranks.run_on_main(lambda: save_unit_importance(path, self.values, self.run.layout, tokens))

    @classmethod
    def load(cls, run: RunContext, path: Path) -> UnitImportance:
        """On the run's device."""
        return cls(run, _to_device(run, load_unit_importance(path, run.layout, run.tokens)))


def _to_device(run: RunContext, values: UnitValues) -> UnitValues:
    device = run.engine.ranks.info.device
    return {group: of_group.to(device) for group, of_group in values.items()}
