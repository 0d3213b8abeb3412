"""What is protected, of any method: measured on text, accumulated over domains, and turned into masks of steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from das_ds.config import SoftmaskConfig
from das_ds.engine.mask import UpdateMasks
from das_ds.errors import ImportanceError
from das_ds.integrations.network import Network
from das_ds.integrations.steps import HookedSteps

Tensors = dict[str, torch.Tensor]


class Protection(ABC):
    """One method's measurements; all methods are called on all ranks together.

    Args:
        network: what is measured.
        steps: what is masked.
        tokens: the vocabulary by id; empty: it is not known.
    """

    def __init__(self, network: Network, steps: HookedSteps, tokens: Sequence[str]) -> None:
        self.network = network
        self.steps = steps
        self.tokens = tokens

    @property
    @abstractmethod
    def is_empty(self) -> bool:
        """Whether nothing is protected yet."""

    @property
    def num_tokens(self) -> int | None:
        """Of the vocabulary that was measured, where rows of tokens that were added since are free; None: unknown."""
        return None

    @abstractmethod
    def clear(self) -> None:
        """Protect nothing."""

    @abstractmethod
    def measure(self, dataloader: Iterable[Any]) -> None:
        """Add what the network needs for this text."""

    @abstractmethod
    def apply(self) -> None:
        """Mask all further steps by what is protected, and by nothing else."""

    @abstractmethod
    def save(self, path: Path) -> None:
        """Write a file that runs of das_ds read, too."""

    @abstractmethod
    def load(self, path: Path) -> None:
        """Protect what a file says, in place of what was measured so far."""

    @abstractmethod
    def tensors(self) -> Tensors:
        """Everything that is protected, complete and in host memory on every rank."""

    @abstractmethod
    def load_tensors(self, tensors: Tensors, num_tokens: int | None = None) -> None:
        """Protect these, in place of what was measured so far.

        Args:
            tensors: as `tensors` gave them.
            num_tokens: as the property was then.

        Raises:
            ImportanceError: they are of another model.
        """

    def _check_shapes(self, tensors: Tensors, expected: dict[str, tuple[int, ...]]) -> None:
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for name in {**expected, **found}:
            if found.get(name) != expected.get(name):
                raise ImportanceError(
                    f"state_dict: found {found.get(name, 'nothing')} for {name}, expected "
                    f"{expected.get(name, 'nothing')}; it is of another model"
                )


class BuiltMasks:
    """A function in the place of an `Importance`, for `apply_masks`."""

    def __init__(self, build: Callable[[SoftmaskConfig], UpdateMasks]) -> None:
        self._build = build

    def masks(self, settings: SoftmaskConfig) -> UpdateMasks:
        """Masks of the flat tensors."""
        return self._build(settings)
