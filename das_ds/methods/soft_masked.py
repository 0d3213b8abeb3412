"""What DAS and DGA share: general knowledge is measured, soft masked, and contrasted with all knowledge."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

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
from das_ds.softmask.apply import apply_masks
from das_ds.softmask.importance import GRANULARITIES, Importance
from das_ds.softmask.measure import GENERAL_KNOWLEDGE, ImportanceLoss

logger = logging.getLogger(__name__)


class SoftMasked(Method):
    """Protects what is important to general knowledge; a method adds what later domains are to be protected for.

    Raises:
        ConfigError: a masked group that the model's table of units lacks.
    """

    default_groups: ClassVar[tuple[str, ...] | None] = None
    """What is masked where `softmask.groups` says nothing; None: everything that has importance."""

    def __init__(self, run: RunContext) -> None:
        super().__init__(run)
        self._granularity = GRANULARITIES[run.config.method.importance.granularity]
        self._softmask = self._resolved_softmask()
        self._contrast = ContrastiveLoss(run)
        self._accumulated: Importance[SoftmaskConfig] | None = None
        self._unit_gates: UnitValues | None = None

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
        assert self._accumulated is not None, "importance was accumulated"
        apply_masks(self.run.engine, self._accumulated, self._softmask, apply_to=self._softmask.apply_to)

    def gates(self) -> UnitValues:
        """Group -> (L, U): what the earlier knowledge that is contrasted keeps of every unit."""
        assert self._unit_gates is not None, "importance was accumulated"
        return self._unit_gates

    def measure(self, domain: DomainContext, label: str, loss: ImportanceLoss) -> Importance[SoftmaskConfig]:
        """Importance under a loss over the domain's sample; `label` names the progress bar."""
        return self._granularity.measure(self.run, domain, label, loss, self.run.config.method.importance)

    @contextmanager
    def losses(self, batch: Batch, token_scale: torch.Tensor) -> Iterator[Losses]:
        """The pre-training loss, plus the contrast where it has weight."""
        if self.run.config.method.contrastive.weight == 0.0:
            step = super().losses(batch, token_scale)
        else:
            step = self._contrast.losses(batch, token_scale, self._gates)
        with step as losses:
            yield losses

    def write(self, domain: DomainContext, importance_by_path: dict[Path, Importance[SoftmaskConfig]]) -> None:
        """Save importance to files, which may take any time.

        Raises:
            RunFolderError: on every rank, when a file cannot be written.
        """
        tokens = self.run.tokens[: domain.num_tokens]
        with domain.suspend_timeout("writing importance"):
            for path, importance in importance_by_path.items():
                importance.save(path, tokens)

    def accumulate(self, new: Importance[SoftmaskConfig]) -> Importance[SoftmaskConfig]:
        """EMax of importance with all before (paper eq. 3), which is returned."""
        self._accumulated = new.accumulate(self._accumulated)
        self._unit_gates = self._accumulated.unit_gates()
        return self._accumulated

    def state(self) -> ComponentState:
        """Accumulated importance, once there is some."""
        state = ComponentState() if self._accumulated is None else self._accumulated.state_dict()
        return replace(state, numbers={"has_importance": self._accumulated is not None})

    def load_state(self, saved: SavedComponentState) -> None:
        """Continue with accumulated importance."""
        if saved.numbers["has_importance"]:
            self._accumulated = self._granularity.load_state_dict(self.run, saved)
            self._unit_gates = self._accumulated.unit_gates()

    def accumulated_importance(self) -> UnitValues | None:
        """Importance by unit that protects the next domain."""
        return self._unit_gates

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

    def _initial_importance(self, domain: DomainContext) -> Importance[SoftmaskConfig]:
        path = self.run.config.method.importance.init_from
        if path is not None:
            return self._granularity.load(self.run, Path(path))
        general = self.measure(domain, "importance of general knowledge", GENERAL_KNOWLEDGE)
        gates = general.unit_gates()
        is_zero = gates is not None and not any(values.any() for values in gates.values())
        if is_zero and self.run.engine.ranks.info.is_main:
            logger.warning(
                "general knowledge protects nothing: its importance is zero, as in a model without dropout, whose "
                "two views are equal; the views of the contrast are then equal too"
            )
        return general
