"""The DeepSpeed engine of a run: its steps, its schedule, its weights and what a checkpoint needs of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from itertools import count
from typing import Any

import deepspeed
import torch
from torch import nn

from das_ds.config import ImportanceScore, TrainConfig
from das_ds.config.deepspeed import is_offloaded, zero_stage
from das_ds.distributed.process_group import ProcessGroup
from das_ds.distributed.state import ComponentState, Flats, SavedComponentState, Shard, zeros_by_flat
from das_ds.engine.frozen_weights import FrozenWeights
from das_ds.engine.gradient_mask import GradientMask
from das_ds.engine.gradient_norm import GradientNorm, without_clipping
from das_ds.engine.loss_scaler import LossScaler, check_precision, emulated_precision_warning
from das_ds.engine.lr_scheduler import build_lr_scheduler
from das_ds.engine.mask import RowUpdateMask
from das_ds.engine.optimizer import MaskedAdamW, build_optimizer
from das_ds.engine.quadratic_penalty import QuadraticPenalty
from das_ds.engine.sharded_init import Slice
from das_ds.engine.weight_snapshot import WeightSnapshot
from das_ds.engine.zero import (
    flats_by_parameter,
    forget_gradients,
    full_fp32_weight,
    refresh_weights,
    release_gathered_weights,
    shards,
)
from das_ds.errors import CheckpointError, TrainingError
from das_ds.kernels.protection import Protection

logger = logging.getLogger(__name__)

WEIGHTS, MOMENT = "weights", "moment/"


def stage_hint(deepspeed_config: dict[str, Any], train: TrainConfig, world_size: int) -> str:
    """Why stage 0 would do the same in less time; "" where it would not.

    It cannot offload, has no loss scale for fp16, and in bf16 sums micro-steps in bf16, which stages 2 and 3 do not.
    """
    stage = zero_stage(deepspeed_config)
    sums_in_bf16 = train.precision == "bf16" and stage > 1 and train.global_batch_size > train.micro_batch_size
    if world_size > 1 or stage == 0 or is_offloaded(deepspeed_config) or train.precision == "fp16" or sums_in_bf16:
        return ""
    return f"ZeRO {stage} on one rank has nothing to shard; stage 0 (ds_configs/zero0.json) trains the same, faster"


def _nothing() -> None:
    pass


class Engine:
    """A model under DeepSpeed, stepped by an optimizer that soft-masks.

    Args:
        module: what the engine runs forward.
        parameters: name -> parameter, the names of the architecture's tables.
        train: optimisation settings.
        deepspeed_config: merged DeepSpeed settings, see `config/deepspeed.py`.
        ranks: the process group.
        exact: parameter name -> this rank's values, where the model was born in shards; used up.
        frozen: name -> parameter of what is not trained.

    Raises:
        ConfigError: a precision or an optimizer that does not run here.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: dict[str, nn.Parameter],
        train: TrainConfig,
        deepspeed_config: dict[str, Any],
        ranks: ProcessGroup,
        exact: dict[str, Slice] | None = None,
        frozen: dict[str, nn.Parameter] | None = None,
    ) -> None:
        check_precision(train.precision)
        if ranks.info.is_main and (slow := emulated_precision_warning(train.precision)):
            logger.warning("train.precision: %s", slow)
        if ranks.info.is_main and (hint := stage_hint(deepspeed_config, train, ranks.info.world_size)):
            logger.warning("deepspeed: %s", hint)
        torch.set_float32_matmul_precision(train.matmul_precision)
        self.parameters = parameters
        """Name -> parameter of everything that is trained."""
        self._names = {parameter: name for name, parameter in parameters.items()}
        self._train = train
        self.ranks = ranks
        on_host = ranks.info.device.type == "cpu" or is_offloaded(deepspeed_config)
        self._optimizer = build_optimizer(parameters, train, on_host=on_host)
        exact = {} if exact is None else exact
        self._frozen = FrozenWeights(frozen or {}, exact, train.precision, ranks)
        for name, parameter in parameters.items() if train.precision != "fp32" else ():
            if name not in exact:
                exact[name] = Slice(0, parameter.detach().flatten().clone())
        self._engine, *_ = deepspeed.initialize(
            model=module.to(ranks.info.device), optimizer=self._optimizer, config=deepspeed_config
        )
        ranks.limit_collectives()
        self._scheduler: torch.optim.lr_scheduler.LambdaLR | None = None
        self._loss_scale = LossScaler(self._engine)
        self._is_measuring = False
        self._was_applied = True
        self.skipped_steps = 0
        """Optimizer steps of this domain that moved nothing: their gradient was not finite, or they were refused."""
        self.on_weights_will_change: Callable[[], None] = _nothing
        """Called before weights or moments change, for whoever still reads them."""
        self._list_shards = list(shards(self._engine, self._names))
        # In 16 bits DeepSpeed makes its fp32 weights from rounded ones; what was trained must not lose bits.
        if exact:
            for shard in self._list_shards:
                start = shard.offset - exact[shard.name].offset
                self._stretch(shard).copy_(exact[shard.name].values[start : start + shard.numel])
            exact.clear()
        self._gradient_mask: Callable[[], None] = _nothing
        receive = self._optimizer.set_grad_scale if isinstance(self._optimizer, MaskedAdamW) else None
        self._norm = GradientNorm(self._engine, parameters.values(), receive)

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
        """Whether the next `step` ends an accumulation; between backward pass and step the gradient is then whole."""
        return bool(self._engine.is_gradient_accumulation_boundary())

    @property
    def zero_stage(self) -> int:
        """ZeRO stage in force."""
        return int(self._engine.zero_optimization_stage())

    def start_domain(
        self, num_steps: int, *, is_first: bool = True, is_last: bool = True, learning_rate: float | None = None
    ) -> None:
        """Forget optimizer moments, start learning-rate schedule, loss scale and count of skipped steps anew.

        Args:
            num_steps: steps of the domain.
            is_first: whether the model comes from no domain of this run.
            is_last: whether it goes on to none.
            learning_rate: peak of the schedule; None: that of the run.
        """
        peak = self._train.learning_rate if learning_rate is None else learning_rate
        self.on_weights_will_change()
        self._optimizer.reset_state()
        self._loss_scale.reset()
        self.skipped_steps = 0
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"] = peak
        self._scheduler = build_lr_scheduler(
            self._optimizer, self._train, num_steps, is_first=is_first, is_last=is_last
        )

    def __call__(self, *inputs: torch.Tensor | None) -> Any:
        """Forward pass for training."""
        return self._engine(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        """Backward pass of one micro-step; DeepSpeed averages over micro-steps and ranks."""
        self._engine.backward(loss)

    def step(self, *, measure_norm: bool = False, refuse: bool = False) -> torch.Tensor | float | None:
        """End one micro-step; at an accumulation boundary clip, step the optimizer and advance the schedule.

        A gradient that is not finite moves nothing, neither weights nor schedule: see `attempts`.

        Args:
            measure_norm: whether the norm is wanted.
            refuse: drop the gradients at a boundary instead of stepping; the same on every rank.

        Returns:
            Norm of the averaged gradient before clipping when `measure_norm` asks for it at a boundary, else None.
        """
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return None
        if not self._is_measuring:
            self.on_weights_will_change()
            self._gradient_mask()
        norm = self._norm.measure_unwrapped()
        refuse = refuse or (norm is not None and not bool(norm.isfinite()))
        with self._optimizer.skip_update() if refuse else nullcontext():
            self._engine.step()
        # DeepSpeed has read this from the device already, to know whether to step.
        overflowed = not self._engine.was_step_applied()
        self._was_applied = not refuse and not overflowed
        self._loss_scale.update(overflowed=overflowed)
        if overflowed:
            forget_gradients(self._engine)
        if not self._is_measuring and not self._was_applied:
            self.skipped_steps += 1
        elif not self._is_measuring:
            assert self._scheduler is not None, "start_domain comes before step"
            self._scheduler.step()
        return self._norm.last() if measure_norm else None

    @property
    def was_step_applied(self) -> bool:
        """Whether the last optimizer step moved the weights."""
        return self._was_applied

    def attempts(self) -> Iterator[int]:
        """Numbers from 0, one for every attempt at an optimizer step; the caller runs all its micro-steps for each.

        Ends as soon as the step was applied. In fp16 a gradient that left the range of the type lowers the loss scale,
        and the same micro-batches are tried again: schedule, data and sums of importance are those of a run without
        overflow. Where no scale can fall (bf16, fp32, a refused step) the caller decides by `was_step_applied`.

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
        """Learning rate of the next optimizer step."""
        return float(self._optimizer.param_groups[0]["lr"])

    @property
    def loss_scale(self) -> float:
        """What the next loss is multiplied by so that its gradients keep clear of zero; 1 but for fp16."""
        return self._loss_scale.value

    def protect(self, protections: dict[torch.Tensor, Protection]) -> None:
        """Mask the updates of these flat tensors from now on, and of no others."""
        self._optimizer.protect(protections)

    def protect_rows(self, masks: RowUpdateMask | None) -> None:
        """Mask the rows of all updates from now on, by whole matrices; None: no longer."""
        self._optimizer.protect_rows(masks)

    def mask_gradients(self, protections: list[Protection]) -> None:
        """Scale the gradient of each shard's elements by its mask from now on, before gradients are clipped."""
        self._gradient_mask = GradientMask(self._engine, self._list_shards, self.parameters, protections).apply

    def flats_by_parameter(self) -> dict[str, torch.Tensor]:
        """Parameter -> the flat tensor that it is stepped in, also where this rank has no part of it."""
        return flats_by_parameter(self._engine, self._names)

    def add_quadratic_penalty(self, strength: float, curvature: Flats, anchor: Flats) -> QuadraticPenalty:
        """A penalty on the distance of the weights from an anchor; its gradient is added where its owner says."""
        shards, parameters, scale = self._list_shards, self.parameters, self._loss_scale
        return QuadraticPenalty(self._engine, shards, parameters, scale, strength, curvature, anchor)

    @contextmanager
    def training_only(self, names: set[str]) -> Iterator[None]:
        """Inside, steps leave all other parameters as they are, to the bit; keeps a copy of this rank's part."""
        kept: dict[torch.Tensor, list[tuple[int, torch.Tensor]]] = {}
        for shard in self._list_shards:
            if shard.name not in names:
                kept.setdefault(shard.flat, []).append((shard.start, self._stretch(shard).clone()))
        with self._optimizer.freezing(kept):
            yield

    @contextmanager
    def accumulating(self, num_micro_steps: int) -> Iterator[None]:
        """Inside, steps end after so many micro-steps, whatever it is in training; entered and left between steps."""
        config, engine = self._engine._config, self._engine
        saved = config.gradient_accumulation_steps, engine.micro_steps
        config.gradient_accumulation_steps, engine.micro_steps = num_micro_steps, 0
        try:
            yield
        finally:
            config.gradient_accumulation_steps, engine.micro_steps = saved

    @contextmanager
    def accumulate_importance(self, kind: ImportanceScore) -> Iterator[Flats]:
        """Inside, a step adds what its averaged gradient contributes to sums, (F,) float32 each, and trains nothing.

        Gradients pass through all of DeepSpeed (accumulation, averaging over ranks, unscaling) but clipping, and arrive
        in the shards of the optimizer, at every stage and under offload.
        """
        sums = zeros_by_flat(self._list_shards, torch.float32)
        self._is_measuring = True
        try:
            with self._optimizer.summing(sums, kind), without_clipping(self._engine):
                yield sums
        finally:
            self._is_measuring = False

    @cached_property
    def named_shards(self) -> dict[str, Shard]:
        """This rank's shard of each parameter that it steps a part of."""
        named = {shard.name: shard for shard in self._list_shards}
        assert len(named) == len(self._list_shards), "a rank steps one stretch of a parameter"
        return named

    def release_gathered_weights(self) -> None:
        """To be called after `torch.autograd.grad` through `module`; frees weights that ZeRO-3 left gathered."""
        release_gathered_weights(self._engine)

    def fp32_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole fp32 weight) of every parameter in turn, on every rank; a collective per parameter."""
        for name, parameter in self.parameters.items():
            yield name, full_fp32_weight(self._engine, parameter)

    def frozen_weights(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """(name, whole fp32 weight as it was loaded) of all that is not trained; None but on rank 0; collective."""
        return self._frozen.gathered()

    def rewrite(self, names: Iterable[str], change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Put `change` of the whole fp32 weight, on the host, in place of each named one; a collective per parameter.

        Args:
            names: the same on every rank.
            change: weight -> weight of the same shape, with the same result on every rank; leaves its input alone.
        """
        self.on_weights_will_change()
        for name in names:
            changed = change(full_fp32_weight(self._engine, self.parameters[name]).cpu()).view(-1)
            if (shard := self.named_shards.get(name)) is not None:
                self._stretch(shard).copy_(
                    changed[shard.offset : shard.offset + shard.numel].view_as(self._stretch(shard))
                )
        refresh_weights(self._engine)

    def weights(self) -> Flats:
        """This rank's part of the fp32 weights, flat tensor -> (F,) view of it, for reading."""
        return {shard.flat: shard.flat.data.view(-1) for shard in self._list_shards}

    @contextmanager
    def writable_weights(self) -> Iterator[Flats]:
        """The same for writing; afterwards the forward pass reads what was written."""
        self.on_weights_will_change()
        yield self.weights()
        refresh_weights(self._engine)

    def shards(self) -> list[Shard]:
        """This rank's shards of the fp32 weights."""
        return self._list_shards

    def snapshot(self) -> list[torch.Tensor]:
        """Copies of this rank's fp32 shards in host memory, for `restore`."""
        return [self._stretch(shard).cpu().clone() for shard in self._list_shards]

    def restore(self, snapshot: list[torch.Tensor]) -> None:
        """Put all weights back to a snapshot."""
        self.on_weights_will_change()
        for shard, saved in zip(self._list_shards, snapshot, strict=True):
            self._stretch(shard).copy_(saved)
        refresh_weights(self._engine)

    def weight_snapshot(self, saved: Flats | None = None) -> WeightSnapshot:
        """A copy of the weights as they are, or as they were saved, that can be run later in place of the present ones.

        Args:
            saved: what `WeightSnapshot.flats` gave, however it was divided.
        """
        if saved is None:
            return WeightSnapshot(self._engine, self.parameters, self._list_shards)
        present = self.snapshot()
        self.on_weights_will_change()
        for flat, values in saved.items():
            flat.data.view(-1).copy_(values)
        earlier = WeightSnapshot(self._engine, self.parameters, self._list_shards)
        self.restore(present)
        return earlier

    def checkpoint_shards(self) -> list[Shard]:
        """This rank's part of what all ranks store together, every weight once.

        At stage 0, where every rank has everything, each stores one stretch of every parameter.
        """
        if self.zero_stage > 0:
            return self._list_shards
        rank, size = self.ranks.info.rank, self.ranks.info.world_size
        cuts = [(shard, shard.numel * rank // size, shard.numel * (rank + 1) // size) for shard in self._list_shards]
        return [
            replace(shard, start=shard.start + first, offset=first, numel=last - first)
            for shard, first, last in cuts
            if last > first
        ]

    def state(self, *, in_domain: bool) -> ComponentState:
        """Weights and, within a domain, moments and schedule; views of what training goes on to change.

        Args:
            in_domain: whether optimizer steps of the present domain are still to come.
        """
        weights = self.weights()
        loss_scale = {"loss_scale": self._loss_scale.state()}
        if not in_domain:
            return ComponentState(sharded={WEIGHTS: weights}, numbers=loss_scale)
        assert self._scheduler is not None, "start_domain comes before state"
        moments, steps = self._optimizer.moments()
        numbers = {
            "optimizer": steps,
            "schedule": self._scheduler.last_epoch,
            "skipped_steps": self.skipped_steps,
            **loss_scale,
        }
        return ComponentState(
            {WEIGHTS: weights, **{f"{MOMENT}{key}": flats for key, flats in moments.items()}}, {}, {}, numbers
        )

    def load_weights(self, saved: SavedComponentState) -> None:
        """Continue with saved weights, however they were divided, and the loss scale, which importance depends on.

        Raises:
            CheckpointError: they are those of another network.
        """
        self._check_complete(saved.sizes(WEIGHTS))
        self.on_weights_will_change()
        self._loss_scale.load(saved.numbers["loss_scale"])
        for flat, values in saved.sharded(WEIGHTS).items():
            flat.data.view(-1).copy_(values)
        refresh_weights(self._engine)

    def load_domain(self, saved: SavedComponentState) -> None:
        """Continue within a domain; comes after `start_domain`."""
        assert self._scheduler is not None, "start_domain comes before load_domain"
        numbers = saved.numbers
        keys = [key for key in self._optimizer.moment_keys if saved.has_sharded(f"{MOMENT}{key}")]
        self._optimizer.load_moments({key: saved.sharded(f"{MOMENT}{key}") for key in keys}, numbers["optimizer"])
        self._loss_scale.load(numbers["loss_scale"])
        self.skipped_steps = numbers["skipped_steps"]
        self._scheduler.last_epoch = steps = numbers["schedule"]
        rates = zip(self._scheduler.base_lrs, self._scheduler.lr_lambdas, strict=True)
        for group, (peak, factor) in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = peak * factor(steps)

    def _check_complete(self, stored: dict[str, int]) -> None:
        own = {name: getattr(p, "ds_numel", p.numel()) for name, p in self.parameters.items()}
        different = [name for name in {**own, **stored} if own.get(name) != stored.get(name)]
        if different:
            first = different[0]
            raise CheckpointError(
                f"weights of a checkpoint: found {stored.get(first, 'no')} values of {first}, expected "
                f"{own.get(first, 'none')}, and {len(different) - 1} more that are not those of this network; was the "
                "model replaced, or transformers changed, since the run was saved?"
            )

    def close(self) -> None:
        """Free hooks and buffers."""
        self._engine.destroy()

    @staticmethod
    def _stretch(shard: Shard) -> torch.Tensor:
        return shard.flat.data.view(-1)[shard.start : shard.start + shard.numel]
