"""Importance protocol: the interface of importance for methods, for every granularity (units of DAS, weights of SPG).

A class that follows it is one module of this package and one line in `softmask.granularities`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, Self, TypeVar

from das_ds.config import ImportanceConfig
from das_ds.context import DomainContext, RunContext
from das_ds.distributed.state import ComponentState, SavedComponentState
from das_ds.engine.mask import UpdateMasks
from das_ds.functional.units import UnitValues
from das_ds.models.size import MemoryUse, ModelSize, Sharding
from das_ds.softmask.measure import ImportanceLoss

Settings = TypeVar("Settings", contravariant=True)


class Importance(Protocol[Settings]):
    """Importance in [0, 1], normalized, of everything that a granularity masks; all methods run on all ranks."""

    @classmethod
    def measure(
        cls, run: RunContext, domain: DomainContext, label: str, loss: ImportanceLoss, settings: ImportanceConfig
    ) -> Self:
        """Importance under a loss over the domain's sample, normalized.

        Args:
            run: the engine and its network.
            domain: whose sample is read.
            label: of the progress bar.
            loss: the loss to differentiate.
            settings: score and normalization.
        """

    @classmethod
    def memory(cls, size: ModelSize, sharding: Sharding, *, has_own_mask: bool) -> MemoryUse:
        """Bytes that importance takes in memory, in checkpoints and in files.

        At the end of a pass it exists twice, accumulated and new, plus the float32 sums of the pass.

        Args:
            size: of the network.
            sharding: how ZeRO shards it.
            has_own_mask: whether the mask differs from the importance and may take memory of its own.
        """

    def accumulate(self, earlier: Self | None) -> Self:
        """Importance of all domains so far, in new tensors: EMax with the earlier one (paper eq. 3)."""

    def masks(self, settings: Settings) -> UpdateMasks:
        """Masks of the engine's flat tensors."""

    def unit_gates(self) -> UnitValues | None:
        """Group -> (L, U) in [0, 1] on the device, the gates of o^prev; None: nothing to contrast."""

    def state_dict(self) -> ComponentState:
        """For a checkpoint; views and references."""

    @classmethod
    def load_state_dict(cls, run: RunContext, saved: SavedComponentState) -> Self:
        """From a checkpoint of any number of ranks."""

    def save(self, path: Path, tokens: Sequence[str]) -> None:
        """Save to one file, atomically, from rank 0 while the others wait.

        Args:
            path: of the file.
            tokens: the vocabulary that importance was measured with, by id.

        Raises:
            RunFolderError: on every rank, when the file cannot be written.
        """

    @classmethod
    def load(cls, run: RunContext, path: Path) -> Self:
        """Load from a file of any number of ranks.

        Raises:
            ImportanceError: missing or damaged file, or importance of another model, vocabulary or granularity.
        """
