"""The teacher: the model from before the domain, which methods ask about the text they train on.

Shape legend: B local sequences, S positions, P predicted tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from das_ds.config import MethodConfig, RunConfig
from das_ds.distributed.state import ComponentState, Flats, SavedComponentState
from das_ds.errors import ConfigError
from das_ds.methods.base import Method
from das_ds.models.size import MemoryUse, ModelSize, Sharding

if TYPE_CHECKING:
    from das_ds.config.deepspeed import EngineConfig
    from das_ds.context import DomainContext, RunContext
    from das_ds.data.batch import Batch
    from das_ds.engine.weight_snapshot import WeightSnapshot

TEACHER = "teacher"

C = TypeVar("C", bound=MethodConfig)


class Teacher:
    """The model as it was when `begin` was called, until `end`.

    Args:
        run: of the method that asks.
    """

    def __init__(self, run: RunContext) -> None:
        self._run = run
        self._snapshot: WeightSnapshot | None = None

    @property
    def exists(self) -> bool:
        """Whether there is one."""
        return self._snapshot is not None

    def begin(self, saved: Flats | None = None) -> None:
        """The present model becomes the teacher, or the one with these weights."""
        self._snapshot = self._run.engine.weights.weight_snapshot(saved)

    def end(self) -> None:
        """There is no teacher until the next `begin`."""
        self._snapshot = None

    def flats(self) -> Flats:
        """Its weights, for a checkpoint."""
        assert self._snapshot is not None, "a domain begins with a teacher"
        return self._snapshot.flats()

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """The teacher as a module, for one forward pass on all ranks, without dropout and without gradients."""
        assert self._snapshot is not None, "a domain begins with a teacher"
        module = self._run.engine.module
        module.eval()
        with torch.no_grad(), self._snapshot.swapped_in():
            yield module
        module.train()


def check_teacher(cause: str, engine_config: EngineConfig) -> None:
    """ZeRO-3 must gather the teacher where it gathers the weights, not from a second copy of these.

    Args:
        cause: key and value of the config that need a teacher.
        engine_config: DeepSpeed's merged settings.

    Raises:
        ConfigError: there is a second copy.
    """
    if engine_config.has_secondary_shards:
        copies = engine_config.raw["zero_optimization"]["zero_hpz_partition_size"]
        raise ConfigError(
            f"deepspeed zero_optimization.zero_hpz_partition_size: found {copies!r} with {cause}, allowed: 1; "
            "DeepSpeed would gather the teacher from a second copy of the present weights"
        )


def teacher_memory(size: ModelSize, sharding: Sharding) -> MemoryUse:
    """The teacher, in the type of training."""
    teacher = sharding.weight_bytes * size.trained
    return MemoryUse(device={"teacher": teacher // sharding.weight_shards}, checkpoint=teacher)


class TeacherMethod(Method[C]):
    """A method with a teacher: the model before the domain, the base model in the first.

    Keeps a copy of the trained weights in the type of training (in 16 bits half of fp32): complete at ZeRO 0 to 2, this
    rank's shard at 3, also in checkpoints within a domain.
    """

    def __init__(self, run: RunContext) -> None:
        super().__init__(run)
        self._teacher = Teacher(run)

    @classmethod
    def validate(cls, config: RunConfig, engine_config: EngineConfig) -> None:
        """There is no second copy of the weights, see `check_teacher`."""
        check_teacher(f"method.name {config.method.name}", engine_config)

    @classmethod
    def memory(cls, config: RunConfig, size: ModelSize, sharding: Sharding) -> MemoryUse:
        """The teacher, in the type of training."""
        return teacher_memory(size, sharding)

    def before_domain(self, domain: DomainContext) -> None:
        """The present model becomes the teacher."""
        self._teacher.begin()

    def after_domain(self, domain: DomainContext) -> None:
        """The next domain has another teacher."""
        self._teacher.end()

    def state_dict(self) -> ComponentState:
        """The teacher, while there is one."""
        if not self._teacher.exists:
            return ComponentState(metadata={"has_teacher": False})
        return ComponentState(sharded={TEACHER: self._teacher.flats()}, metadata={"has_teacher": True})

    def load_state_dict(self, saved: SavedComponentState) -> None:
        """Continue with the same teacher."""
        if saved.metadata["has_teacher"]:
            self._teacher.begin(saved.sharded(TEACHER))
        else:
            self._teacher.end()

    def teach(self, batch: Batch, predicted: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward pass of the teacher over the corrupted rows, without dropout and without gradients.

        Args:
            batch: this rank's sequences.
            predicted: (P,) int64, positions whose loss is wanted, as in `Batch.predicted`.
            targets: (P,) int64, the tokens there.

        Returns:
            Hidden states (B, S, H), and the cross-entropy of each position (P,) float32.
        """
        with self._teacher.active() as module:
            hidden, losses = module(batch.corrupted_ids, predicted, targets, batch.position_ids)
        return hidden, losses
