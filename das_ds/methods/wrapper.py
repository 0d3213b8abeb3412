"""Wrapper: a method that adds something to any other one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from das_ds.config import MethodConfig
from das_ds.distributed.state import ComponentState, SavedComponentState
from das_ds.functional.units import UnitValues
from das_ds.methods.base import Losses, Method

if TYPE_CHECKING:
    from das_ds.context import DomainContext
    from das_ds.data.batch import Batch
    from das_ds.softmask.plasticity import DomainPlasticity


class MethodWrapper(Method[MethodConfig]):
    """Does what another method does; subclasses add to it.

    Args:
        method: the method that trains.
    """

    Config = MethodConfig

    def __init__(self, method: Method[Any]) -> None:
        super().__init__(method.run)
        self._method = method

    def on_run_start(self) -> None:
        """Delegates to the method."""
        self._method.on_run_start()

    def before_domain(self, domain: DomainContext) -> None:
        """Delegates to the method."""
        self._method.before_domain(domain)

    def on_train_start(self, domain: DomainContext) -> None:
        """Delegates to the method."""
        self._method.on_train_start(domain)

    def on_step_start(self, step: int) -> None:
        """Delegates to the method."""
        self._method.on_step_start(step)

    @contextmanager
    def losses(self, batch: Batch, token_scale: torch.Tensor) -> Iterator[Losses]:
        """Delegates to the method."""
        with self._method.losses(batch, token_scale) as losses:
            yield losses

    def after_domain(self, domain: DomainContext) -> None:
        """Delegates to the method."""
        self._method.after_domain(domain)

    def state_dict(self) -> ComponentState:
        """State of the method."""
        return self._method.state_dict()

    def load_state_dict(self, saved: SavedComponentState) -> None:
        """Delegates to the method."""
        self._method.load_state_dict(saved)

    def accumulated_importance(self) -> UnitValues | None:
        """Delegates to the method."""
        return self._method.accumulated_importance()

    def plasticity(self) -> DomainPlasticity | None:
        """Delegates to the method."""
        return self._method.plasticity()
