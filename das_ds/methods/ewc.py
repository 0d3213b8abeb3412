"""EWC: elastic weight consolidation (Kirkpatrick et al., PNAS 2017), online (Schwarz et al., ICML 2018).

Shape legend: N sequences of the sample, b a batch of them that gives one gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from das_ds.config import MethodConfig, RunConfig, SampleSize
from das_ds.distributed.collectives import all_reduce_sum
from das_ds.distributed.state import ComponentState, Flats, SavedComponentState
from das_ds.methods.base import Losses, Method, check_gradient_batch_size
from das_ds.models.size import FP32, MemoryUse, ModelSize, Sharding, StepUse

if TYPE_CHECKING:
    from das_ds.config.deepspeed import EngineConfig
    from das_ds.context import DomainContext, RunContext
    from das_ds.data.batch import Batch
    from das_ds.engine.quadratic_penalty import QuadraticPenalty

EWC_LOSS = "ewc"
FISHER = "fisher"
ANCHOR = "anchor"


class EwcConfig(MethodConfig):
    """Elastic weight consolidation: weights are pulled back by their Fisher information in earlier domains."""

    state_keys = ("decay", "num_samples", "gradient_batch_size")

    name: Literal["ewc"] = "ewc"
    lambda_: float = Field(default=10.0, ge=0.0, alias="lambda")
    """Factor of the penalty lambda / 2 * sum_i F_i (theta_i - theta*_i)^2, F being that of single sequences.
    With a small learning rate the default hardly protects; values from 1e4 on did in docs/results/evidence.md."""
    decay: float = Field(default=1.0, ge=0.0, le=1.0)
    """Factor of the Fisher information of all earlier domains when a domain's is added; 1 forgets none."""
    num_samples: int = Field(default=10_000, ge=1)
    """Sequences per domain on which Fisher information is measured (at most the complete corpus is used)."""
    gradient_batch_size: int | None = Field(default=None, ge=1)
    """Sequences per gradient of that measurement, a multiple of the ranks; fewer distinguish single sequences better
    and take longer; null: `train.global_batch_size`."""

    @property
    def sample_size(self) -> SampleSize:
        """Size of the sample of Fisher information."""
        return SampleSize(self.num_samples, gradient_batch_size=self.gradient_batch_size)


class EWC(Method[EwcConfig]):
    """Pulls every weight back to where it was before the domain, by its Fisher information in earlier domains:

        L(theta) = L_pretrain(theta) + lambda / 2 * sum_i F_i (theta_i - theta*_i)^2      (Kirkpatrick et al., eq. 3)
        F after domain t = decay * F after domain t-1 + F of domain t                    (Schwarz et al., section 4)

    theta* are the weights after the last domain only, as in the online form; the additional `decay` of its penalty is
    absorbed by lambda. The Fisher information of a domain is the empirical one (targets from the text), of single
    sequences, on `num_samples` of them after training:

        F_i = (1/N) sum_b (sum_{n in b} dL(x_n) / dtheta_i)^2       L(x_n): mean loss of the predicted tokens

    With batches b of one sequence this is the definition; larger ones (`gradient_batch_size`) have the same expectation
    up to the square of the mean gradient, which is small at the end of a domain, so that lambda is comparable across
    batch sizes. There is no penalty in the first domain.

    The penalty's gradient lambda * F * (theta - theta*) is added to that of the loss, as published, and clipped and
    normalized by Adam together with it. So lambda is relative to the gradient of the loss, and a weight whose gradient
    is dominated by the penalty moves back at the full learning rate, for any larger lambda.

    Keeps two fp32 numbers per weight (F and theta*), sharded like the optimizer. Extra compute: one pass over them per
    step, and one forward and backward pass over the sample per domain.
    """

    Config = EwcConfig

    def __init__(self, run: RunContext) -> None:
        super().__init__(run)
        self._fisher: Flats | None = None
        self._anchor: Flats | None = None
        self._penalty: QuadraticPenalty | None = None

    @classmethod
    def validate(cls, config: RunConfig, engine_config: EngineConfig) -> None:
        """The sequences of a gradient are divided over the ranks."""
        check_gradient_batch_size("method.gradient_batch_size", config, engine_config)

    @classmethod
    def memory(cls, config: RunConfig, size: ModelSize, sharding: Sharding) -> MemoryUse:
        """Fisher information and anchor of every trained weight, of which the anchor goes with the domain."""
        fisher = FP32 * size.trained
        return MemoryUse(
            optimizer={"Fisher information": 2 * fisher // sharding.optimizer_shards},
            checkpoint=2 * fisher,
            domain=fisher,
            measurement="gradients",
        )

    @classmethod
    def step_use(cls, config: RunConfig, size: ModelSize, sharding: Sharding) -> StepUse:
        """The penalty's value, for the log; its gradient is that of each rank's own shard."""
        return StepUse(num_losses=1)

    def before_domain(self, domain: DomainContext) -> None:
        """Anchor the weights where the last domain left them."""
        if self._fisher is not None:
            self._anchor = {flat: weights.clone() for flat, weights in self.run.engine.weights.flats().items()}

    def on_train_start(self, domain: DomainContext) -> None:
        """Penalize all further steps."""
        self._penalty = None
        if self._fisher is not None:
            assert self._anchor is not None, "before_domain comes before on_train_start"
            self._penalty = self.run.engine.add_quadratic_penalty(self.settings.lambda_, self._fisher, self._anchor)

    @contextmanager
    def losses(self, batch: Batch, token_scale: torch.Tensor) -> Iterator[Losses]:
        """The pre-training loss; the penalty, which does not depend on the batch, is added in the last micro-step."""
        with super().losses(batch, token_scale) as losses:
            yield losses
        if self._penalty is not None and self.run.engine.is_last_micro_step:
            # Losses are averaged over micro-steps.
            losses[EWC_LOSS] = self._penalty.add_gradient() * self.run.engine.accumulation_steps

    def after_domain(self, domain: DomainContext) -> None:
        """Add the domain's Fisher information to that of all before."""
        from das_ds.softmask.measure import PRETRAINING, TOTALS
        from das_ds.softmask.parameter import sum_over_gradients

        # A checkpoint that is being written may still read the tensors that are released or changed here.
        self.run.engine.on_weights_will_change()
        self._anchor = self._penalty = None
        steps = domain.sample_steps(f"Fisher information of {domain.name}")
        sums = sum_over_gradients(self.run, steps, PRETRAINING, "squared_grad")
        count = float(all_reduce_sum(steps.accumulators[TOTALS].clone())[0])
        scale = self.run.config.gradient_batch_size**2 / count
        self.run.engine.on_weights_will_change()
        if self._fisher is None:
            self._fisher = {flat: torch.zeros_like(total) for flat, total in sums.items()}
        for flat, total in sums.items():
            self._fisher[flat].mul_(self.settings.decay).add_(total, alpha=scale)

    def state_dict(self) -> ComponentState:
        """Fisher information, and the anchor within a domain."""
        tensors = {FISHER: self._fisher, ANCHOR: self._anchor}
        return ComponentState(sharded={name: flats for name, flats in tensors.items() if flats is not None})

    def load_state_dict(self, saved: SavedComponentState) -> None:
        """Continue from any sharding."""
        self._fisher = saved.sharded(FISHER) if saved.has_sharded(FISHER) else None
        self._anchor = saved.sharded(ANCHOR) if saved.has_sharded(ANCHOR) else None
