"""L2-SP: a quadratic penalty on the distance of the weights from where they started (Li et al., ICML 2018)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from das_ds.config import MethodConfig, RunConfig
from das_ds.distributed.state import ComponentState, Flats, SavedComponentState
from das_ds.methods.base import Losses, Method
from das_ds.models.size import FP32, MemoryUse, ModelSize, Sharding, StepUse

if TYPE_CHECKING:
    from das_ds.context import DomainContext, RunContext
    from das_ds.data.batch import Batch
    from das_ds.engine.quadratic_penalty import QuadraticPenalty

L2_LOSS = "l2"
ANCHOR = "anchor"


class L2Config(MethodConfig):
    """L2-SP: all weights are pulled back to where they were before the domain."""

    name: Literal["l2"] = "l2"
    lambda_: float = Field(default=0.01, ge=0.0, alias="lambda")
    """Factor of the penalty lambda / 2 * sum_i (theta_i - theta*_i)^2."""


class L2(Method[L2Config]):
    """Pulls every weight back to where it was before the domain, all with the same strength:

        L(theta) = L_pretrain(theta) + lambda / 2 * |theta - theta*|^2

    The penalty of Li, Grandvalet & Davoine, *Explicit Inductive Bias for Transfer Learning with Convolutional Networks*
    (L2-SP, ICML 2018, arXiv 1802.01483), without its term on the weights of new layers, as there are none. theta* are
    the weights before each domain, in the first those of the base model. It is `ewc` with Fisher information 1; its
    gradient takes the same way, through clipping and Adam.

    Keeps one fp32 number per weight (theta*), sharded like the optimizer. Extra compute: one pass over it per step.
    """

    Config = L2Config

    def __init__(self, run: RunContext) -> None:
        super().__init__(run)
        self._anchor: Flats | None = None
        self._penalty: QuadraticPenalty | None = None

    @classmethod
    def memory(cls, config: RunConfig, size: ModelSize, sharding: Sharding) -> MemoryUse:
        """The anchor of every trained weight, within a domain."""
        anchor = FP32 * size.trained
        return MemoryUse(optimizer={"anchor": anchor // sharding.optimizer_shards}, checkpoint=anchor)

    @classmethod
    def step_use(cls, config: RunConfig, size: ModelSize, sharding: Sharding) -> StepUse:
        """The penalty's value, for the log; its gradient is that of each rank's own shard."""
        return StepUse(num_losses=1)

    def before_domain(self, domain: DomainContext) -> None:
        """Anchor the weights where the last domain left them."""
        self._anchor = {flat: weights.clone() for flat, weights in self.run.engine.weights.flats().items()}

    def on_train_start(self, domain: DomainContext) -> None:
        """Penalize all further steps."""
        assert self._anchor is not None, "before_domain comes before on_train_start"
        self._penalty = self.run.engine.add_quadratic_penalty(self.settings.lambda_, None, self._anchor)

    @contextmanager
    def losses(self, batch: Batch, token_scale: torch.Tensor) -> Iterator[Losses]:
        """The pre-training loss; the penalty, which does not depend on the batch, is added in the last micro-step."""
        assert self._penalty is not None, "on_train_start comes before losses"
        with super().losses(batch, token_scale) as losses:
            yield losses
        if self.run.engine.is_last_micro_step:
            # Losses are averaged over micro-steps.
            losses[L2_LOSS] = self._penalty.add_gradient() * self.run.engine.accumulation_steps

    def after_domain(self, domain: DomainContext) -> None:
        """The next domain has another anchor."""
        # A checkpoint that is being written may still read it.
        self.run.engine.on_weights_will_change()
        self._anchor = self._penalty = None

    def state_dict(self) -> ComponentState:
        """The anchor, within a domain."""
        return ComponentState() if self._anchor is None else ComponentState(sharded={ANCHOR: self._anchor})

    def load_state_dict(self, saved: SavedComponentState) -> None:
        """Continue from any sharding."""
        self._anchor = saved.sharded(ANCHOR) if saved.has_sharded(ANCHOR) else None
