"""Method contract: the hooks by which the training loop talks to a method; it never asks a method's name.

A method is one file in this package and one line in `METHODS`: a config class for its keys, and a `Method` with the
checks, the memory estimate and the hooks that it needs. The config loads this package, so its modules import DeepSpeed,
transformers, and modules that import these, inside functions only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from das_ds.config import MethodConfig, RunConfig
from das_ds.distributed.state import ComponentState, SavedComponentState
from das_ds.errors import ConfigError
from das_ds.functional.units import UnitValues
from das_ds.models.size import MeasuredSequences, MemoryUse, ModelSize, PlannedMatrices, Sharding, StepUse

if TYPE_CHECKING:
    from das_ds.config.deepspeed import EngineConfig
    from das_ds.context import DomainContext, RunContext
    from das_ds.data.batch import Batch
    from das_ds.softmask.plasticity import DomainPlasticity

C = TypeVar("C", bound=MethodConfig)

Losses = dict[str, torch.Tensor]
"""Name -> scalar whose mean over ranks and micro-steps is the global loss."""


class Method(Generic[C]):
    """A continual-learning method; every hook does nothing special unless a method overrides it.

    A run that continues calls `load_state_dict` and then the hook in which it was stopped, from its beginning: the
    hook's measurements find their sums, and everything else that it does must give the same result when repeated.
    """

    Config: type[C] = MethodConfig  # type: ignore[assignment]
    """Keys of the section `method`; the default of `name` is the method's name, and the first line of the docstring is
    its summary in `das-ds methods`."""

    starts_from_base = False
    """Each domain starts from the base model instead of the previous domain's."""

    planned_matrices: PlannedMatrices = "none"
    """Trained matrices of the network that `memory` and `step_use` need to know."""

    def __init__(self, run: RunContext) -> None:
        self.run = run
        self.settings = self.settings_in(run.config)

    @classmethod
    def settings_in(cls, config: RunConfig) -> C:
        """The section `method` of a run of this method."""
        settings = config.method
        assert isinstance(settings, cls.Config), f"{settings.name} is not the config of {cls.__name__}"
        return settings

    @classmethod
    def validate(cls, config: RunConfig, engine_config: EngineConfig) -> None:
        """Check settings that depend on other sections, the DeepSpeed config or the number of ranks.

        Args:
            config: the run.
            engine_config: DeepSpeed's merged settings, with batch sizes.

        Raises:
            ConfigError: settings that the method does not support.
        """

    @classmethod
    def memory(cls, config: RunConfig, size: ModelSize, sharding: Sharding) -> MemoryUse:
        """Memory and disk space that the method needs in addition to model and optimizer."""
        return MemoryUse()

    @classmethod
    def step_use(cls, config: RunConfig, size: ModelSize, sharding: Sharding) -> StepUse:
        """Operations and exchanges that the method adds to each optimizer step."""
        return StepUse()

    @classmethod
    def measured_sequences(cls, config: RunConfig, size: ModelSize, num_ranks: int) -> MeasuredSequences:
        """Sequences that the method measures on; unless it says otherwise, its sample after each domain."""
        sample = config.method.sample_size
        return MeasuredSequences(after=0 if sample is None or sample.num_samples is None else sample.num_samples)

    @classmethod
    def check_files(cls, config: RunConfig) -> None:
        """Check the files that the method's settings name, as far as that takes no network; for preflight.

        Raises:
            DasError: a file that cannot be read, or of another kind.
        """

    def on_run_start(self) -> None:
        """Called once, before anything of a run is computed or saved, and not when a run continues.

        Files that the method needs later are checked here: once there is a checkpoint, the config cannot change.
        """

    def before_domain(self, domain: DomainContext) -> None:
        """Called before the first step on a domain, not when a run continues within its steps."""

    def on_train_start(self, domain: DomainContext) -> None:
        """Called whenever steps on a domain begin or continue, after `before_domain` or `load_state_dict`."""

    def on_step_start(self, step: int) -> None:
        """Called before the micro-steps of optimizer step `step` of the domain, and again when it is repeated."""

    @contextmanager
    def losses(self, batch: Batch, token_scale: torch.Tensor) -> Iterator[Losses]:
        """Named losses of one micro-batch; the backward pass runs inside the context.

        In fp16 a step whose gradient overflowed is repeated: its micro-batches are passed again.

        Args:
            batch: this rank's sequences.
            token_scale: scalar; ranks * micro-steps / predicted tokens of the global batch, so that the mean over
                ranks and micro-steps of token_scale * (summed token loss) is the loss per predicted token.
        """
        _, losses = self.run.engine(batch.corrupted_ids, batch.predicted, batch.targets, batch.position_ids)
        yield {self.run.objective: losses.sum() * token_scale}

    def after_domain(self, domain: DomainContext) -> None:
        """Called after the last step on a domain; also writes the method's files."""

    def state_dict(self) -> ComponentState:
        """State that a run needs to continue; views and references, copied by the caller."""
        return ComponentState()

    def load_state_dict(self, saved: SavedComponentState) -> None:
        """Continue from a state, on any number of ranks."""

    def accumulated_importance(self) -> UnitValues | None:
        """Importance by unit that protects the next domain, for the report; None where the method has none."""
        return None

    def plasticity(self) -> DomainPlasticity | None:
        """What earlier domains leave free to learn, for console, metrics and report; None: the method measures none.

        Asked after `before_domain`, with every logged step, and after `after_domain`; equal on all ranks.
        """
        return None


def check_gradient_batch_size(key: str, config: RunConfig, engine_config: EngineConfig) -> None:
    """Check that every rank gets the same number of the sequences of a measured gradient.

    Args:
        key: config key of the batch size.
        config: the run.
        engine_config: DeepSpeed's merged settings.

    Raises:
        ConfigError: not a multiple of the number of ranks.
    """
    per_rank = engine_config.raw["train_micro_batch_size_per_gpu"] * engine_config.raw["gradient_accumulation_steps"]
    num_ranks = engine_config.raw["train_batch_size"] // per_rank
    if config.gradient_batch_size % num_ranks:
        raise ConfigError(
            f"{key}: found {config.gradient_batch_size}, expected a multiple of the number of ranks, {num_ranks}"
        )
