"""What DAS and DGA share: general knowledge is measured, soft masked, and contrasted with all knowledge."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from das_ds.config import SoftmaskConfig
from das_ds.context import DomainContext, RunContext
from das_ds.data.batch import Batch
from das_ds.distributed.state import ComponentState, SavedComponentState
from das_ds.errors import ConfigError
from das_ds.functional.units import UNOWNED, UnitValues
from das_ds.methods.base import Losses, Method
from das_ds.methods.contrastive import ContrastiveLoss
from das_ds.run_dir import GENERAL_IMPORTANCE_FILE
from das_ds.softmask.importance import ImportanceLevel
from das_ds.softmask.measure import GENERAL_KNOWLEDGE
from das_ds.softmask.parameter import ParameterLevel
from das_ds.softmask.unit import UnitLevel

logger = logging.getLogger(__name__)

LEVELS: dict[str, type[ImportanceLevel[Any]]] = {"unit": UnitLevel, "parameter": ParameterLevel}


class SoftMasked(Method):
    """Protects what is important to general knowledge; a method adds what later domains are to be protected for.

    Raises:
        ConfigError: a masked group that the model's table of units lacks.
    """

    default_groups: ClassVar[tuple[str, ...] | None] = None
    """What is masked where `softmask.groups` says nothing; None: everything that has importance."""

    def __init__(self, run: RunContext) -> None:
        super().__init__(run)
        self.level = LEVELS[run.config.method.importance.granularity](run)
        self._softmask = self._resolved_softmask()
        self._contrast = ContrastiveLoss(run)
        self._accumulated: Any = None
        self._by_unit: UnitValues | None = None

    def before_domain(self, domain: DomainContext) -> None:
        """Before the first domain: importance of general knowledge."""
        if self._accumulated is None:
            general = self._initial_importance(domain)
            self.write(domain, {domain.run_folder / GENERAL_IMPORTANCE_FILE: general})
            self.accumulate(general)

    def on_train_start(self, domain: DomainContext) -> None:
        """Protect what was learned so far."""
        self._gates = self.gates()
        self.protect()

    def protect(self) -> None:
        """Soft-mask all further steps by the importance accumulated so far."""
        self.level.protect(self._accumulated, self._softmask)

    def gates(self) -> UnitValues:
        """Group -> (L, U): what the earlier knowledge that is contrasted keeps of every unit."""
        assert self._by_unit is not None, "importance was accumulated"
        return self._by_unit

    @contextmanager
    def losses(self, batch: Batch, token_scale: torch.Tensor) -> Iterator[Losses]:
        """The pre-training loss, plus the contrast where it has weight."""
        if self.run.config.method.contrastive.weight == 0.0:
            step = super().losses(batch, token_scale)
        else:
            step = self._contrast.losses(batch, token_scale, self._gates)
        with step as losses:
            yield losses

    def write(self, domain: DomainContext, dense_importance: dict[Path, Any]) -> None:
        """Save importance to files, which may take any time.

        Raises:
            RunFolderError: on every rank, when a file cannot be written.
        """
        tokens = self.run.tokens[: domain.num_tokens]
        with domain.suspend_timeout("writing importance"):
            for path, importance in dense_importance.items():
                self.level.write(path, importance, tokens)

    def accumulate(self, new: Any) -> Any:
        """EMax of importance of `level` with all before (paper eq. 3), which is returned."""
        self._accumulated = self.level.maximum(new, self._accumulated)
        self._by_unit = self.level.by_unit(self._accumulated)
        return self._accumulated

    def state(self) -> ComponentState:
        """Accumulated importance, once there is some."""
        has_importance = self._accumulated is not None
        state = self.level.state(self._accumulated) if has_importance else ComponentState()
        return replace(state, numbers={"has_importance": has_importance})

    def load_state(self, saved: SavedComponentState) -> None:
        """Continue with accumulated importance."""
        if saved.numbers["has_importance"]:
            self._accumulated = self.level.load_state(saved)
            self._by_unit = self.level.by_unit(self._accumulated)

    def accumulated_importance(self) -> UnitValues | None:
        """Importance by unit that protects the next domain."""
        return self._by_unit

    def _resolved_softmask(self) -> SoftmaskConfig:
        softmask = self.run.config.method.softmask
        groups = self.default_groups if softmask.groups is None else softmask.groups
        allowed = [*self.run.layout.num_units, UNOWNED]
        if unknown := [group for group in groups or () if group not in allowed]:
            raise ConfigError(
                f"method.softmask.groups: found {unknown[0]}, which the {self.run.layout.model_type} architecture spec "
                f"has no units of; allowed: {', '.join(allowed)}"
            )
        return softmask.model_copy(update={"groups": groups})

    def _initial_importance(self, domain: DomainContext) -> Any:
        path = self.run.config.method.importance.init_from
        if path is not None:
            return self.level.read(Path(path))
        general = self.level.measure(domain, "importance of general knowledge", GENERAL_KNOWLEDGE)
        is_zero = not any(values.any() for values in self.level.by_unit(general).values())
        if is_zero and self.run.engine.ranks.info.is_main:
            logger.warning(
                "general knowledge protects nothing: its importance is zero, as in a model without dropout, whose "
                "two views are equal; the views of the contrast are then equal too"
            )
        return general
