"""Soft masking: the base of DAS and DGA, which protect general knowledge and contrast it with all."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch
from pydantic import Field, model_validator

from das_ds.config import ImportanceConfig, MethodConfig, RunConfig, SampleSize, SoftmaskConfig
from das_ds.distributed.state import ComponentState, SavedComponentState
from das_ds.errors import ConfigError
from das_ds.functional.units import UNOWNED, UnitValues
from das_ds.methods.base import Losses, Method, check_gradient_batch_size
from das_ds.methods.contrastive import NUM_CLEAN_VIEWS, ContrastiveConfig, ContrastiveLoss, contrastive_step_use
from das_ds.models.size import MeasuredSequences, MemoryUse, ModelSize, Sharding, StepUse
from das_ds.run_dir import GENERAL_IMPORTANCE_FILE
from das_ds.softmask.granularities import GRANULARITIES, load_granularity

if TYPE_CHECKING:
    from das_ds.config.deepspeed import EngineConfig
    from das_ds.context import DomainContext, RunContext
    from das_ds.data.batch import Batch
    from das_ds.softmask.importance import Importance
    from das_ds.softmask.measure import ImportanceLoss

logger = logging.getLogger(__name__)


class SoftMaskedConfig(MethodConfig):
    """Settings of methods that soft-mask by importance."""

    state_keys = ("view_dropout", "importance")

    view_dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Dropout at the units where views are made (contrast, general knowledge), for networks without dropout."""
    softmask: SoftmaskConfig = SoftmaskConfig()
    importance: ImportanceConfig = ImportanceConfig()
    contrastive: ContrastiveConfig = ContrastiveConfig()

    @property
    def sample_size(self) -> SampleSize:
        """Size of the sample of an importance pass."""
        importance = self.importance
        return SampleSize(importance.num_samples, importance.batch_size, importance.gradient_batch_size)

    @property
    def view_noise(self) -> float:
        """`view_dropout`."""
        return self.view_dropout

    @model_validator(mode="after")
    def _granularity_is_known(self) -> SoftMaskedConfig:
        found = self.importance.granularity
        if found not in GRANULARITIES:
            hint = "; directions are a method of their own, method: directions" if found == "direction" else ""
            raise ValueError(f"importance.granularity: found {found!r}, allowed: {' | '.join(GRANULARITIES)}{hint}")
        return self

    @model_validator(mode="after")
    def _mask_fits_granularity(self) -> SoftMaskedConfig:
        if self.importance.granularity == "parameter" and self.softmask.include_consumers:
            raise ValueError(
                "softmask.include_consumers needs importance.granularity: unit, found true with parameter, where every "
                "weight has its own importance; allowed there: false"
            )
        return self


S = TypeVar("S", bound=SoftMaskedConfig)


class SoftMasked(Method[S]):
    """Protects units or weights that matter to general knowledge; subclasses add importance of domains.

    Raises:
        ConfigError: a masked group that the model's table of units lacks.
    """

    default_groups: ClassVar[tuple[str, ...] | None] = None
    """Groups that are masked where `softmask.groups` is null; None: everything that has importance."""

    def __init__(self, run: RunContext) -> None:
        super().__init__(run)
        self._granularity = load_granularity(self.settings.importance.granularity)
        self._softmask = self._resolved_softmask()
        self._contrastive = ContrastiveLoss(run, self.settings.contrastive)
        self._accumulated: Importance[SoftmaskConfig] | None = None
        self._initial: Importance[SoftmaskConfig] | None = None
        """From a file, until the first domain."""
        self._unit_gates: UnitValues | None = None

    @classmethod
    def validate(cls, config: RunConfig, engine_config: EngineConfig) -> None:
        """The sequences of a gradient are divided over the ranks, and the update has to be linear in the moment."""
        check_gradient_batch_size("method.importance.gradient_batch_size", config, engine_config)
        if cls.settings_in(config).softmask.apply_to == "first_moment" and config.train.optimizer == "lion":
            raise ConfigError(
                "method.softmask.apply_to: found first_moment with train.optimizer lion, which takes the sign of its "
                "moment, so that no factor changes the update; allowed there: update, gradient"
            )

    @classmethod
    def memory(cls, config: RunConfig, size: ModelSize, sharding: Sharding) -> MemoryUse:
        """Importance, and the views of the contrast."""
        settings = cls.settings_in(config)
        granularity = load_granularity(settings.importance.granularity)
        views = NUM_CLEAN_VIEWS * config.train.micro_batch_size if settings.contrastive.weight > 0.0 else 0
        importance = granularity.memory(size, sharding, has_own_mask=cls._has_own_mask(settings.softmask))
        return importance + MemoryUse(extra_rows=views)

    @classmethod
    def step_use(cls, config: RunConfig, size: ModelSize, sharding: Sharding) -> StepUse:
        """The contrast over the views of all ranks; the mask itself is part of the optimizer's pass over the shard."""
        if cls.settings_in(config).contrastive.weight == 0.0:
            return StepUse()
        return contrastive_step_use(config, size)

    @classmethod
    def measured_sequences(cls, config: RunConfig, size: ModelSize, num_ranks: int) -> MeasuredSequences:
        """Two views of every sequence of the sample for general knowledge, unless a file has its importance."""
        importance = cls.settings_in(config).importance
        is_measured = importance.init_from is None
        return MeasuredSequences(before_first=2 * importance.num_samples if is_measured else 0)

    @classmethod
    def check_files(cls, config: RunConfig) -> None:
        """Whether `importance.init_from` is an importance file of the granularity."""
        from das_ds.softmask.importance_file import check_granularity, stored_importance

        importance = cls.settings_in(config).importance
        if importance.init_from is not None:
            path = Path(importance.init_from)
            with stored_importance(path) as stored:
                check_granularity(path, stored.granularity, importance.granularity)

    def on_run_start(self) -> None:
        """Importance from a file, which is checked against the network."""
        self._initial = self._load_initial()

    def before_domain(self, domain: DomainContext) -> None:
        """Before the first domain: importance of general knowledge."""
        if self._accumulated is None:
            general = self._initial_importance(domain)
            self.write(domain, {domain.run_folder / GENERAL_IMPORTANCE_FILE: general})
            self.accumulate(general)

    def on_train_start(self, domain: DomainContext) -> None:
        """Mask by the importance accumulated so far."""
        self._gates = self.gates()
        self.protect()

    def protect(self) -> None:
        """Soft-mask all further steps by the importance accumulated so far."""
        from das_ds.softmask.apply import apply_masks

        assert self._accumulated is not None, "importance was accumulated"
        apply_masks(self.run.engine, self._accumulated, self._softmask, apply_to=self._softmask.apply_to)

    def gates(self) -> UnitValues:
        """Group -> (L, U): the factor by which the view of earlier knowledge is multiplied at every unit."""
        assert self._unit_gates is not None, "importance was accumulated"
        return self._unit_gates

    def measure(self, domain: DomainContext, label: str, loss: ImportanceLoss) -> Importance[SoftmaskConfig]:
        """Importance under a loss over the domain's sample; `label` names the progress bar."""
        return self._granularity.measure(self.run, domain, label, loss, self.settings.importance)

    @contextmanager
    def losses(self, batch: Batch, token_scale: torch.Tensor) -> Iterator[Losses]:
        """The pre-training loss, plus the contrast where it has weight."""
        if self.settings.contrastive.weight == 0.0:
            step = super().losses(batch, token_scale)
        else:
            step = self._contrastive.losses(batch, token_scale, self._gates)
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

    def state_dict(self) -> ComponentState:
        """Accumulated importance, once there is some."""
        state = ComponentState() if self._accumulated is None else self._accumulated.state_dict()
        return replace(state, metadata={"has_importance": self._accumulated is not None})

    def load_state_dict(self, saved: SavedComponentState) -> None:
        """Continue with accumulated importance."""
        if saved.metadata["has_importance"]:
            self._accumulated = self._granularity.load_state_dict(self.run, saved)
            self._unit_gates = self._accumulated.unit_gates()

    def accumulated_importance(self) -> UnitValues | None:
        """Importance by unit that protects the next domain."""
        return self._unit_gates

    @classmethod
    def _has_own_mask(cls, softmask: SoftmaskConfig) -> bool:
        """Whether the mask of single weights differs from their importance and needs memory of its own."""
        masks_all = cls.default_groups is None and softmask.groups is None
        return not (masks_all and softmask.exponent == softmask.unowned_update_scale == 1.0)

    def _resolved_softmask(self) -> SoftmaskConfig:
        softmask = self.settings.softmask
        groups = self.default_groups if softmask.groups is None else softmask.groups
        allowed = [*self.run.layout.num_units, UNOWNED]
        if unknown := [group for group in groups or () if group not in allowed]:
            raise ConfigError(
                f"method.softmask.groups: found {unknown[0]}, which the {self.run.layout.model_type} architecture spec "
                f"has no units of; allowed: {', '.join(allowed)}"
            )
        return softmask.model_copy(update={"groups": groups})

    def _load_initial(self) -> Importance[SoftmaskConfig] | None:
        path = self.settings.importance.init_from
        return None if path is None else self._granularity.load(self.run, Path(path))

    def _initial_importance(self, domain: DomainContext) -> Importance[SoftmaskConfig]:
        from das_ds.softmask.measure import GENERAL_KNOWLEDGE

        # A run that continues from before its first domain has not read it.
        initial = self._initial or self._load_initial()
        self._initial = None
        if initial is not None:
            return initial
        general = self.measure(domain, "importance of general knowledge", GENERAL_KNOWLEDGE)
        gates = general.unit_gates()
        is_zero = gates is not None and not any(values.any() for values in gates.values())
        if is_zero and self.run.engine.ranks.info.is_main:
            logger.warning(
                "general knowledge protects nothing: its importance is zero, as in a model without dropout, whose "
                "two views are equal; the views of the contrast are then equal too"
            )
        return general
