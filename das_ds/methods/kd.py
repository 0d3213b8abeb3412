"""KD: distillation that keeps hidden states close to those of the model before the domain.

Shape legend: B local sequences, S positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from das_ds.config import MethodConfig, RunConfig
from das_ds.distributed.state import ComponentState, SavedComponentState
from das_ds.errors import ConfigError
from das_ds.functional.losses import distillation_loss
from das_ds.methods.base import Losses, Method
from das_ds.models.size import MemoryUse, ModelSize, Sharding, StepUse

if TYPE_CHECKING:
    from das_ds.config.deepspeed import EngineConfig
    from das_ds.context import DomainContext, RunContext
    from das_ds.data.batch import Batch
    from das_ds.engine.weight_snapshot import WeightSnapshot

DISTILLATION_LOSS = "distillation"
TEACHER = "teacher"


class KdConfig(MethodConfig):
    """Knowledge distillation from the model as it was before the domain."""

    name: Literal["kd"] = "kd"
    weight: float = Field(default=1.0, ge=0.0)
    """Factor of the divergence of final hidden states from those of the teacher, which is tiny at weight 1;
    docs/results/evidence.md uses 1000."""
    temperature: float = Field(default=1.0, gt=0.0)
    """Divisor of hidden states before the softmax over the hidden size."""


class KD(Method[KdConfig]):
    """Knowledge distillation (Hinton et al., 2015), on new text as in Learning without Forgetting (Li & Hoiem, 2018).

        L = L_pretrain + w T^2 KL(softmax(h_teacher / T) || softmax(h / T))

    h are the hidden states before the LM head, the softmax is over the hidden size and the mean over all positions: the
    form of the baseline KD of the DAS paper (Ke et al., ICLR 2023, section 4). The teacher is the model before the
    domain, the base model in the first; it reads the same corrupted rows, without dropout.

    Keeps a copy of the trained weights in the type of training (in 16 bits half of fp32): complete at ZeRO 0 to 2, this
    rank's shard at 3, also in checkpoints within a domain. Extra compute: one forward pass per micro-step, about a
    third of a step, and at ZeRO 3 one more gather of every layer.
    """

    Config = KdConfig

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

    @classmethod
    def step_use(cls, config: RunConfig, size: ModelSize, sharding: Sharding) -> StepUse:
        """The teacher's forward pass."""
        return StepUse(forward_passes=1, num_losses=1)

    def before_domain(self, domain: DomainContext) -> None:
        """The present model becomes the teacher."""
        self._teacher = self.run.engine.weights.weight_snapshot()

    @contextmanager
    def losses(self, batch: Batch, token_scale: torch.Tensor) -> Iterator[Losses]:
        """The pre-training loss plus the divergence from the teacher, over all positions of the batch."""
        teacher_hidden = self._teach(batch)
        hidden, losses = self.run.engine(batch.corrupted_ids, batch.predicted, batch.targets, batch.position_ids)
        divergence = distillation_loss(teacher_hidden, hidden, temperature=self.settings.temperature)
        yield {
            self.run.objective: losses.sum() * token_scale,
            DISTILLATION_LOSS: self.settings.weight * divergence,
        }

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
    def _teach(self, batch: Batch) -> torch.Tensor:
        """(B, S, H) hidden states of the teacher."""
        assert self._teacher is not None, "a domain begins with a teacher"
        module = self.run.engine.module
        module.eval()
        with self._teacher.swapped_in():
            hidden, _ = module(batch.corrupted_ids, batch.predicted[:0], batch.targets[:0], batch.position_ids)
        module.train()
        teacher_hidden: torch.Tensor = hidden
        return teacher_hidden
