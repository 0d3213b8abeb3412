"""The DeepSpeed engine of a run: training steps, learning-rate schedule, masks, and checkpoint state."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import count
from typing import Any

import deepspeed
import torch
from torch import nn

from das_ds.config import ImportanceScore, TrainConfig
from das_ds.config.deepspeed import EngineConfig
from das_ds.distributed.process_group import ProcessGroup
from das_ds.distributed.state import ComponentState, Flats, SavedComponentState, zeros_by_flat
from das_ds.engine.frozen_weights import FrozenWeights
from das_ds.engine.gradient_norm import GradientNorm
from das_ds.engine.group_norms import GroupNorms
from das_ds.engine.loss_scaler import LossScaler, check_precision, emulated_precision_warning
from das_ds.engine.lr_scheduler import build_lr_scheduler
from das_ds.engine.mask import DecayMasks, GradientMask, UpdateMasks
from das_ds.engine.optimizer import MaskedAdamW, build_optimizer
from das_ds.engine.quadratic_penalty import QuadraticPenalty
from das_ds.engine.sharded_init import ExactWeights, Slice
from das_ds.engine.step_masks import frozen_spans
from das_ds.engine.weights import ShardedWeights
from das_ds.engine.zero import drop_gradients, get_gradients, gradient_accumulation, without_clipping
from das_ds.errors import CheckpointError, TrainingError

logger = logging.getLogger(__name__)

WEIGHTS = "weights"
MOMENT = "moment/"


def stage_hint(config: EngineConfig, train: TrainConfig, world_size: int) -> str:
    """A hint that stage 0 would give the same result in less time; "" where it would not.

    Stage 0 cannot offload, has no loss scale for fp16, and in bf16 sums micro-steps in bf16, which stages 2 and 3 do
    not.
    """
    accumulates = train.global_batch_size > train.micro_batch_size
    sums_differ = train.precision == "bf16" and config.zero_stage > 1 and accumulates
    has_reason = world_size > 1 or config.is_offloaded or train.precision == "fp16" or sums_differ
    if config.zero_stage == 0 or has_reason:
        return ""
    return (
        f"ZeRO {config.zero_stage} on one rank has nothing to shard; stage 0 (deepspeed: zero0) trains the same, faster"
    )


def _do_nothing() -> None:
    pass


class Engine:
    """A model under DeepSpeed, stepped by an optimizer that soft-masks.

    Args:
        module: the module that the engine runs.
        parameters: name -> parameter, the names of the architecture's tables.
        train: optimization settings.
        config: DeepSpeed's settings.
        ranks: the process group.
        exact: this rank's exact values where the model was initialized sharded; they are taken.
        frozen: name -> parameter that is not trained.
        depths: see `build_optimizer`.

    Raises:
        ConfigError: a precision or an optimizer that does not run here.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: dict[str, nn.Parameter],
        train: TrainConfig,
        config: EngineConfig,
        ranks: ProcessGroup,
        exact: ExactWeights | None = None,
        frozen: dict[str, nn.Parameter] | None = None,
        depths: Mapping[str, int] | None = None,
    ) -> None:
        check_precision(train.precision)
        if ranks.info.is_main:
            _log_hints(config, train, ranks.info.world_size)
        torch.set_float32_matmul_precision(train.matmul_precision)
        self.parameters = parameters
        """Name -> parameter of everything that is trained."""
        self._train = train
        self.ranks = ranks
        exact = ExactWeights() if exact is None else exact
        on_host = ranks.info.device.type == "cpu" or config.is_offloaded
        self._optimizer = build_optimizer(parameters, train, on_host=on_host, depths=depths)
        # Both keep fp32 values, and DeepSpeed rounds the parameters as soon as it has them.
        self._frozen = FrozenWeights(frozen or {}, exact, train.precision, ranks)
        exact_trained = _take_exact(parameters, exact, train.precision)
        self._engine, *_ = deepspeed.initialize(
            model=module.to(ranks.info.device), optimizer=self._optimizer, config=config.raw
        )
        ranks.limit_collectives()
        self._scheduler: torch.optim.lr_scheduler.LambdaLR | None = None
        self._loss_scale = LossScaler(self._engine)
        self._is_measuring = False
        self._was_applied = True
        self.skipped_steps = 0
        """Optimizer steps of this domain that moved nothing: their gradient was not finite, or they were refused."""
        self.on_weights_will_change: Callable[[], None] = _do_nothing
        """Called before weights or moments change, for readers such as a checkpoint that is being written."""
        self.weights = ShardedWeights(self._engine, parameters, ranks, lambda: self.on_weights_will_change())
        """The fp32 weights, sharded over the ranks."""
        self.weights.set_exact(exact_trained)
        self._gradient_mask: GradientMask | None = None
        self._group_norms: GroupNorms | None = None
        self.group_norms: dict[str, float] = {}
        """Group of parameters -> norm of the gradient like that of `step`, of the last step that measured it; {} unless
        `measure_groups` was called."""
        self._frozen_elements: dict[int, int] = {}
        """Number of the shard -> how many of its first elements are frozen."""
        self._gradients = get_gradients(self._engine, self.weights.shards, parameters)
        # AdamW's kernel divides gradients as it reads them; other optimizers get divided gradients.
        set_grad_scale = self._optimizer.set_grad_scale if isinstance(self._optimizer, MaskedAdamW) else None
        self._norm = GradientNorm(self._engine, parameters.values(), set_grad_scale)

    @property
    def module(self) -> nn.Module:
        """The model, to be called directly where no gradient of its weights is wanted."""
        return self._engine.module

    @property
    def accumulation_steps(self) -> int:
        """Micro-steps per optimizer step."""
        return int(self._engine.gradient_accumulation_steps())

    @property
    def is_last_micro_step(self) -> bool:
        """Whether the next `step` ends an accumulation; the gradient is then complete after the backward pass."""
        return bool(self._engine.is_gradient_accumulation_boundary())

    @property
    def decays_weights(self) -> bool:
        """Whether steps multiply weights by 1 - learning rate * weight decay."""
        return any(group["weight_decay"] > 0.0 for group in self._optimizer.param_groups)

    @property
    def zero_stage(self) -> int:
        """ZeRO stage that the engine uses."""
        return int(self._engine.zero_optimization_stage())

    def start_domain(
        self,
        num_steps: int,
        *,
        train: TrainConfig | None = None,
        is_first: bool = True,
        is_last: bool = True,
        keeps_moments: bool = False,
    ) -> None:
        """Start the learning-rate schedule and the count of skipped steps; reset optimizer moments and loss scale.

        Args:
            num_steps: steps of the domain.
            train: learning rate and schedule of the domain; None: those of the run.
            is_first: whether it is the first domain of the run.
            is_last: whether it is the last.
            keeps_moments: leave moments, their step counts and the loss scale as they are.
        """
        train = self._train if train is None else train
        self.on_weights_will_change()
        if not keeps_moments:
            self._optimizer.reset_state()
            self._loss_scale.reset()
        self.skipped_steps = 0
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"] = train.learning_rate * group["lr_scale"]
        self._scheduler = build_lr_scheduler(self._optimizer, train, num_steps, is_first=is_first, is_last=is_last)

    def mask_first_moments(self) -> None:
        """Mask kept first moments like the gradients that they average; may be a collective.

        m is linear in the gradients, so that what earlier ones left in it does not pass a mask that came after them.
        """
        if self._gradient_mask is None:
            return
        self.on_weights_will_change()
        moments = self._optimizer.moments()[0].get("exp_avg", {})
        # Where every step so far was refused there are no moments yet, on any rank.
        self._gradient_mask.apply_(
            [
                moments[shard.flat][shard.span] if shard.flat in moments else shard.flat.new_zeros(shard.numel)
                for shard in self.weights.shards
            ]
        )

    def __call__(self, *inputs: Any) -> Any:
        """Forward pass for training; the module's arguments, in their order."""
        return self._engine(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        """Backward pass of one micro-step; DeepSpeed averages over micro-steps and ranks."""
        self._engine.backward(loss)

    def step(self, *, measure_norm: bool = False, refuse: bool = False) -> torch.Tensor | float | None:
        """End one micro-step; at an accumulation boundary clip, step the optimizer and advance the schedule.

        A gradient that is not finite moves nothing, neither weights nor schedule: see `retry_on_overflow`.

        Args:
            measure_norm: whether to return the norm.
            refuse: drop the gradients at a boundary instead of stepping; the same on every rank.

        Returns:
            Norm of the averaged gradient before clipping when `measure_norm` asks for it at a boundary, else None.
        """
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return None
        if not self._is_measuring:
            self.on_weights_will_change()
            # Before the norm: clipping uses the norm of the masked gradients.
            if self._gradient_mask is not None or self._frozen_elements:
                self._mask_gradients(self._gradients())
        if measure_norm and self._group_norms is not None:
            self.group_norms = self._group_norms.measure(self._gradients(), self._loss_scale.value)
        norm = self._norm.measure_unwrapped()
        refuse = refuse or (norm is not None and not bool(norm.isfinite()))
        # DeepSpeed also drops the gradients of a step that is refused, and advances its counters.
        with self._optimizer.skip_update() if refuse else nullcontext():
            self._engine.step()
        # No sync here: DeepSpeed has read this from the device already, to know whether to step.
        overflowed = not self._engine.was_step_applied()
        self._was_applied = not refuse and not overflowed
        self._loss_scale.update(overflowed=overflowed)
        if overflowed:
            drop_gradients(self._engine)
        if not self._is_measuring and not self._was_applied:
            self.skipped_steps += 1
        elif not self._is_measuring:
            assert self._scheduler is not None, "start_domain comes before step"
            self._scheduler.step()
        return self._norm.last() if measure_norm else None

    def _mask_gradients(self, gradients: Sequence[torch.Tensor]) -> None:
        if self._gradient_mask is not None:
            self._gradient_mask.apply_(gradients)
        if self._frozen_elements:
            torch._foreach_zero_([gradients[number][:numel] for number, numel in self._frozen_elements.items()])

    @property
    def step_was_applied(self) -> bool:
        """Whether the last optimizer step moved the weights."""
        return self._was_applied

    def retry_on_overflow(self) -> Iterator[int]:
        """0, 1, ... for every attempt at an optimizer step; the caller runs all its micro-steps for each.

        Ends as soon as the step was applied. In fp16 a gradient that left the range of the type lowers the loss scale,
        and the same micro-batches run again: schedule, data and sums of importance are those of a run without overflow.
        Where no scale can fall (bf16, fp32, a refused step) the caller decides by `step_was_applied`.

        Raises:
            TrainingError: the gradient is not finite at the smallest or a fixed loss scale, or, in any precision, while
                importance is measured.
        """
        for attempt in count():
            yield attempt
            if self._was_applied:
                return
            if self._loss_scale.retry_helps:
                logger.info("gradient beyond fp16; trying the step again at loss scale %g", self._loss_scale.value)
            elif self._is_measuring or (self._train.precision == "fp16" and not self._engine.was_step_applied()):
                raise TrainingError(
                    f"the gradient is not finite at loss scale {self._loss_scale.value:g}, which cannot fall further; "
                    "lower train.learning_rate, or train in bf16 or fp32"
                )
            else:
                return

    def learning_rate(self) -> float:
        """Learning rate of the next optimizer step, before `train.layer_lr_decay`."""
        group = self._optimizer.param_groups[0]
        return float(group["lr"] / group["lr_scale"])

    @property
    def loss_scale(self) -> float:
        """Factor of the next loss that keeps fp16 gradients from underflow; 1 in other precisions."""
        return self._loss_scale.value

    def set_masks(self, masks: UpdateMasks, *, masks_decay: bool = True) -> None:
        """Mask the updates of these flat tensors from now on, and of no others; see `MaskedOptimizer.set_masks`."""
        self._optimizer.set_masks(masks, masks_decay=masks_decay)

    def set_gradient_mask(self, mask: GradientMask | None, decay: DecayMasks | None = None) -> None:
        """Mask the gradients of `weights.shards` from now on, before they are clipped; None: no longer.

        Args:
            mask: of gradients.
            decay: flat tensor -> mask of its weight decay, which needs none where the weight decay is 0.
        """
        self._gradient_mask = mask
        self._optimizer.set_decay_masks(decay or {})

    def measure_groups(self, groups: Mapping[str, str]) -> None:
        """Measure `group_norms` in further steps that measure their norm.

        Args:
            groups: parameter -> group, of all parameters.
        """
        self._group_norms = GroupNorms(self.weights.shards, groups, is_sharded=self.zero_stage > 0)

    def add_quadratic_penalty(self, strength: float, curvature: Flats | None, anchor: Flats) -> QuadraticPenalty:
        """A penalty on the distance of the weights from an anchor; the caller adds its gradient before each step.

        Args:
            strength, curvature, anchor: see `QuadraticPenalty`.
        """
        return QuadraticPenalty(
            self._engine, self.weights.shards, self.parameters, self._loss_scale, strength, curvature, anchor
        )

    @contextmanager
    def training_only(self, names: set[str]) -> Iterator[None]:
        """Inside, steps leave all other parameters bitwise unchanged, see `set_frozen`; afterwards none is frozen."""
        self.set_frozen({name: numel for name, numel in self.weights.numels().items() if name not in names})
        try:
            yield
        finally:
            self.set_frozen({})

    def set_frozen(self, frozen: Mapping[str, int]) -> None:
        """Leave parameters bitwise unchanged in all further steps, and no others.

        Their gradients become 0 before the norm is taken for clipping. Keeps a copy of this rank's shards of them.

        Args:
            frozen: parameter -> how many of its first elements keep their values.
        """
        self._frozen_elements, spans = frozen_spans(self.weights.shards, frozen)
        self._optimizer.set_frozen(spans)

    def gradient_accumulation(self, num_micro_steps: int) -> AbstractContextManager[None]:
        """Inside, a step ends after so many micro-steps; entered and left between steps."""
        return gradient_accumulation(self._engine, num_micro_steps)

    @contextmanager
    def accumulate_importance(self, kind: ImportanceScore) -> Iterator[Flats]:
        """Inside, a step adds the score of its averaged gradient to sums, (F,) float32 each, and trains nothing.

        Gradients pass through all of DeepSpeed (accumulation, averaging over ranks, unscaling) but clipping, and arrive
        in the shards of the optimizer, at every stage and under offload.
        """
        sums = zeros_by_flat(self.weights.shards, torch.float32)
        self._is_measuring = True
        try:
            with self._optimizer.accumulate_importance(sums, kind), without_clipping(self._engine):
                yield sums
        finally:
            self._is_measuring = False

    @property
    def frozen_names(self) -> list[str]:
        """Parameters that are not trained."""
        return self._frozen.names

    def gather_weight(self, name: str, owners: Collection[int]) -> torch.Tensor | None:
        """The complete fp32 weight of a parameter on some ranks, None elsewhere; a collective.

        Args:
            name: of a trained weight, or of a frozen one, which is as it was loaded.
            owners: ranks that get it in host memory; it may be the engine's own memory, so they do not change it.
        """
        if name not in self.parameters:
            return self._frozen.gather(name, owners)
        # From the fp32 shards: under ZeRO-3 the parameters of the module are partitioned, and in 16 bits rounded.
        weight = self.weights.fp32_weight(name)
        return weight.cpu() if self.ranks.info.rank in owners else None

    def state_dict(self) -> ComponentState:
        """Weights, and the loss scale, on which importance depends; views of tensors that training changes.

        Where moments outlive a domain, they are part of it.
        """
        state = ComponentState(
            sharded={WEIGHTS: self.weights.flats()}, metadata={"loss_scale": self._loss_scale.state()}
        )
        return state if self._train.reset_optimizer else self._with_moments(state)

    def load_state_dict(self, saved: SavedComponentState, *, growing: Collection[str] = ()) -> None:
        """Restore weights, however they were sharded, the loss scale, and moments that outlive a domain.

        Args:
            saved: of a checkpoint.
            growing: parameters that may have more rows than when they were saved; the values of these become 0.

        Raises:
            CheckpointError: they are those of another network.
        """
        self._check_complete(saved.sizes(WEIGHTS), growing)
        self._loss_scale.load(saved.metadata["loss_scale"])
        self.weights.load(saved.sharded(WEIGHTS))
        if not self._train.reset_optimizer:
            self._load_moments(saved)

    def domain_state_dict(self) -> ComponentState:
        """Learning-rate schedule, loss scale, and moments that end with the domain; views, as in `state_dict`."""
        assert self._scheduler is not None, "start_domain comes before domain_state_dict"
        state = ComponentState(
            metadata={
                "schedule": self._scheduler.last_epoch,
                "skipped_steps": self.skipped_steps,
                "loss_scale": self._loss_scale.state(),
            }
        )
        return self._with_moments(state) if self._train.reset_optimizer else state

    def load_domain_state_dict(self, saved: SavedComponentState) -> None:
        """Resume within a domain; comes after `start_domain`, which resets all of this."""
        assert self._scheduler is not None, "start_domain comes before load_domain_state_dict"
        metadata = saved.metadata
        if self._train.reset_optimizer:
            self._load_moments(saved)
        self._loss_scale.load(metadata["loss_scale"])
        self.skipped_steps = metadata["skipped_steps"]
        self._scheduler.last_epoch = steps = metadata["schedule"]
        rates = zip(self._scheduler.base_lrs, self._scheduler.lr_lambdas, strict=True)
        for group, (peak, factor) in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = peak * factor(steps)

    def _with_moments(self, state: ComponentState) -> ComponentState:
        moments, steps = self._optimizer.moments()
        return replace(
            state,
            sharded={**state.sharded, **{f"{MOMENT}{key}": flats for key, flats in moments.items()}},
            metadata={**state.metadata, "optimizer": steps},
        )

    def _load_moments(self, saved: SavedComponentState) -> None:
        """Continue with the moments of a checkpoint; zero where it was saved before the first step."""
        self._optimizer.reset_state()
        keys = [key for key in self._optimizer.moment_keys if saved.has_sharded(f"{MOMENT}{key}")]
        self._optimizer.load_moments(
            {key: saved.sharded(f"{MOMENT}{key}") for key in keys}, saved.metadata["optimizer"]
        )

    def _check_complete(self, stored: dict[str, int], growing: Collection[str]) -> None:
        expected = self.weights.numels()
        stored = {
            name: expected[name] if name in growing and size < expected.get(name, 0) else size
            for name, size in stored.items()
        }
        different = [name for name in {**expected, **stored} if expected.get(name) != stored.get(name)]
        if different:
            first = different[0]
            raise CheckpointError(
                f"weights of a checkpoint: found {stored.get(first, 'no')} values of {first}, expected "
                f"{expected.get(first, 'none')}, and {len(different) - 1} more that are not those of this network; was "
                "the model replaced, or transformers changed, since the run was saved?"
            )

    def close(self) -> None:
        """Free hooks and buffers."""
        self._engine.destroy()


def _log_hints(config: EngineConfig, train: TrainConfig, world_size: int) -> None:
    if warning := emulated_precision_warning(train.precision):
        logger.warning("train.precision: %s", warning)
    if hint := stage_hint(config, train, world_size):
        logger.warning("deepspeed: %s", hint)


def _take_exact(parameters: dict[str, nn.Parameter], exact: ExactWeights, precision: str) -> dict[str, Slice]:
    """Parameter -> its fp32 values, where DeepSpeed makes its fp32 weights from rounded ones (in 16 bits)."""
    values = exact.take(parameters)
    if precision == "fp32":
        return values
    complete = {name: p for name, p in parameters.items() if name not in values}
    return values | {name: Slice(0, parameter.detach().flatten().clone()) for name, parameter in complete.items()}
