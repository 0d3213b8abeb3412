"""The teacher: the model from before the domain, which methods ask about the text of the domain.

Shape legend: B local sequences, S positions, P predicted tokens, H hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch

from das_ds.config import MethodConfig, RunConfig
from das_ds.distributed.state import ComponentState, SavedComponentState
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


class TeacherMethod(Method[C]):
    """A method with a teacher: the model before the domain, the base model in the first.

    Keeps a copy of the trained weights in the type of training (in 16 bits half of fp32): complete at ZeRO 0 to 2, this
    rank's shard at 3, also in checkpoints within a domain.
    """

    def __init__(self, run: RunContext) -> None:
        super().__init__(run)
        self._teacher: WeightSnapshot | None = None

    @classmethod
    def validate(cls, config: RunConfig, engine_config: EngineConfig) -> None:
        """ZeRO-3 must gather the teacher where it gathers the weights, not from a second copy of these."""
        if engine_config.has_secondary_shards:
            copies = engine_config.raw["zero_optimization"]["zero_hpz_partition_size"]
            raise ConfigError(
                f"deepspeed zero_optimization.zero_hpz_partition_size: found {copies!r} with method.name "
                f"{config.method.name}, allowed: 1; DeepSpeed would gather the teacher from a second copy of the "
                "present weights"
            )

    @classmethod
    def memory(cls, config: RunConfig, size: ModelSize, sharding: Sharding) -> MemoryUse:
        """The teacher, in the type of training."""
        teacher = sharding.weight_bytes * size.trained
        return MemoryUse(device={"teacher": teacher // sharding.weight_shards}, checkpoint=teacher)

    def before_domain(self, domain: DomainContext) -> None:
        """The present model becomes the teacher."""
        self._teacher = self.run.engine.weights.weight_snapshot()

    def after_domain(self, domain: DomainContext) -> None:
        """The next domain has another teacher."""
        self._teacher = None

    def state_dict(self) -> ComponentState:
        """The teacher, while there is one."""
        if self._teacher is None:
            return ComponentState(metadata={"has_teacher": False})
        return ComponentState(sharded={TEACHER: self._teacher.flats()}, metadata={"has_teacher": True})

    def load_state_dict(self, saved: SavedComponentState) -> None:
        """Continue with the same teacher."""
        has_teacher = saved.metadata["has_teacher"]
        self._teacher = self.run.engine.weights.weight_snapshot(saved.sharded(TEACHER)) if has_teacher else None

    @torch.no_grad()
    def teach(self, batch: Batch, predicted: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward pass of the teacher over the corrupted rows, without dropout and without gradients.

        Args:
            batch: this rank's sequences.
            predicted: (P,) int64, positions whose loss is wanted, as in `Batch.predicted`.
            targets: (P,) int64, the tokens there.

        Returns:
            Hidden states (B, S, H), and the cross-entropy of each position (P,) float32.
        """
        assert self._teacher is not None, "a domain begins with a teacher"
        module = self.run.engine.module
        module.eval()
        with self._teacher.swapped_in():
            hidden, losses = module(batch.corrupted_ids, predicted, targets, batch.position_ids)
        module.train()
        return hidden, losses
