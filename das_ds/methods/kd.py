"""KD: distillation that keeps hidden states close to those of the model before the domain."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from das_ds.config import MethodConfig, RunConfig
from das_ds.functional.losses import distillation_loss
from das_ds.methods.base import Losses
from das_ds.methods.teacher import TeacherMethod
from das_ds.models.size import ModelSize, Sharding, StepUse

if TYPE_CHECKING:
    from das_ds.data.batch import Batch

DISTILLATION_LOSS = "distillation"


class KdConfig(MethodConfig):
    """Knowledge distillation from the model as it was before the domain."""

    has_teacher = True

    name: Literal["kd"] = "kd"
    weight: float = Field(default=1.0, ge=0.0)
    """Factor of the divergence of final hidden states from those of the teacher, which is tiny at weight 1;
    docs/results/evidence.md uses 1000."""
    temperature: float = Field(default=1.0, gt=0.0)
    """Divisor of hidden states before the softmax over the hidden size."""


class KD(TeacherMethod[KdConfig]):
    """Knowledge distillation (Hinton et al., 2015), on new text as in Learning without Forgetting (Li & Hoiem, 2018).

        L = L_pretrain + w T^2 KL(softmax(h_teacher / T) || softmax(h / T))

    h are the hidden states before the LM head, the softmax is over the hidden size and the mean over all positions: the
    form of the baseline KD of the DAS paper (Ke et al., ICLR 2023, section 4). The teacher is the model before the
    domain, the base model in the first; it reads the same corrupted rows, without dropout.

    Keeps the teacher (see `TeacherMethod`). Extra compute: one forward pass per micro-step, about a third of a step,
    and at ZeRO 3 one more gather of every layer.
    """

    Config = KdConfig

    @classmethod
    def step_use(cls, config: RunConfig, size: ModelSize, sharding: Sharding) -> StepUse:
        """The teacher's forward pass."""
        return StepUse(forward_passes=1, forward_rows=1.0, num_losses=1)

    @contextmanager
    def losses(self, batch: Batch, token_scale: torch.Tensor) -> Iterator[Losses]:
        """The pre-training loss plus the divergence from the teacher, over all positions of the batch."""
        teacher_hidden, _ = self.teach(batch, batch.predicted[:0], batch.targets[:0])
        hidden, losses = self.run.engine(batch.corrupted_ids, batch.predicted, batch.targets, batch.position_ids)
        divergence = distillation_loss(teacher_hidden, hidden, temperature=self.settings.temperature)
        yield {
            self.run.objective: losses.sum() * token_scale,
            DISTILLATION_LOSS: self.settings.weight * divergence,
        }
