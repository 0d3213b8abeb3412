"""STM: selective token masking, which does not train on tokens that the model finds surprising."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from das_ds.config import MethodConfig, RunConfig
from das_ds.methods.base import Losses
from das_ds.methods.teacher import TeacherMethod
from das_ds.models.size import ModelSize, Sharding, StepUse

if TYPE_CHECKING:
    from das_ds.data.batch import Batch


class StmConfig(MethodConfig):
    """Selective token masking: no loss on tokens whose perplexity was high before the domain."""

    has_teacher = True

    name: Literal["stm"] = "stm"
    max_perplexity: float = Field(default=2.5, ge=1.0)
    """Largest perplexity, under the model before the domain, of a token that is trained on; 2.5 is the default of the
    authors' training script."""


class STM(TeacherMethod[StmConfig]):
    """Selective token masking (Wu et al., *Mitigating Forgetting in LLM Fine-Tuning via Low-Perplexity Token Learning*,
    NeurIPS 2025, arXiv 2501.14315):

        L = (1/N) sum_p w_p l_p(theta)            w_p = 1 if exp(l_p(theta*)) <= max_perplexity, else 0

    over the N predicted tokens of the global batch, l_p being the cross-entropy of one and theta* the model before the
    domain, which reads the same corrupted rows, without dropout. Masked tokens count in N, so that the logged loss is
    that of the tokens that are left times their fraction.

    Keeps the teacher (see `TeacherMethod`). Extra compute: one forward pass with the LM head per micro-step, about a
    third of a step, and at ZeRO 3 one more gather of every layer.
    """

    Config = StmConfig

    @classmethod
    def step_use(cls, config: RunConfig, size: ModelSize, sharding: Sharding) -> StepUse:
        """The teacher's forward pass, of which the LM head is not counted."""
        return StepUse(forward_passes=1, forward_rows=1.0)

    @contextmanager
    def losses(self, batch: Batch, token_scale: torch.Tensor) -> Iterator[Losses]:
        """The pre-training loss of the tokens that are left."""
        _, teacher_losses = self.teach(batch, batch.predicted, batch.targets)
        kept = teacher_losses <= math.log(self.settings.max_perplexity)
        _, losses = self.run.engine(batch.corrupted_ids, batch.predicted, batch.targets, batch.position_ids)
        yield {self.run.objective: (losses * kept).sum() * token_scale}
