"""What the method needs of importance, whatever it belongs to: units (DAS) or single weights (SPG)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

from das_ds.config import SoftmaskConfig
from das_ds.context import DomainContext, RunContext
from das_ds.distributed.state import ComponentState, SavedComponentState
from das_ds.functional.units import UnitValues
from das_ds.softmask.apply import SoftMasks
from das_ds.softmask.measure import ImportanceLoss

T = TypeVar("T")


class ImportanceLevel(ABC, Generic[T]):
    """Measures, accumulates, stores and applies importance of type T; every method is called on all ranks."""

    def __init__(self, run: RunContext) -> None:
        self.run = run

    @cached_property
    def soft_masks(self) -> SoftMasks:
        """What masks the steps of the run's engine."""
        return SoftMasks(self.run.engine)

    @abstractmethod
    def measure(self, domain: DomainContext, label: str, loss: ImportanceLoss) -> T:
        """Normalised importance under `loss` over the domain's sample; `label` names the progress bar."""

    @abstractmethod
    def maximum(self, new: T, accumulated: T | None) -> T:
        """EMax (paper eq. 3)."""

    @abstractmethod
    def by_unit(self, importance: T) -> UnitValues:
        """Group -> (L, U) in [0, 1] on the device, the gates of o^prev."""

    @abstractmethod
    def protect(self, importance: T, softmask: SoftmaskConfig) -> None:
        """Soft-mask all further steps; `softmask` is the same at every call."""

    @abstractmethod
    def state(self, importance: T) -> ComponentState:
        """For a checkpoint."""

    @abstractmethod
    def load_state(self, saved: SavedComponentState) -> T:
        """From a checkpoint of any number of ranks."""

    @abstractmethod
    def write(self, path: Path, importance: T, tokens: Sequence[str]) -> None:
        """Save to one file, atomically, from rank 0 while the others wait.

        Args:
            path: of the file.
            importance: what is saved.
            tokens: the vocabulary that it was measured with, by id.

        Raises:
            RunFolderError: on every rank, when the file cannot be written.
        """

    @abstractmethod
    def read(self, path: Path) -> T:
        """Load from a file of any number of ranks.

        Raises:
            ImportanceError: missing or damaged file, or importance of another model, vocabulary or granularity.
        """
