"""The DeepSpeed engine of a run and the two places where soft masks act: the gradient and the optimizer's update."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers import get_scheduler

from das_ds.config import SoftmaskConfig, TrainConfig
from das_ds.distributed.launch import Ranks
from das_ds.distributed.optimizer import MaskedAdamW
from das_ds.distributed.zero import (
    Shard,
    full_fp32_weight,
    gradient_norm,
    refresh_weights,
    release_gathered_weights,
    shards,
)
from das_ds.functional.masks import MaskTable, Piece, pieces_of_stretch
from das_ds.functional.units import Importance, UnitLayout


class Engine:
    """A model under DeepSpeed, stepped by `MaskedAdamW`.

    Args:
        module: what the engine runs forward.
        parameters: name -> parameter, the names of the architecture's tables.
        train: optimisation settings.
        deepspeed_config: merged DeepSpeed settings, see `deepspeed_config.py`.
        ranks: the process group.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: dict[str, nn.Parameter],
        train: TrainConfig,
        deepspeed_config: dict[str, Any],
        ranks: Ranks,
    ) -> None:
        self._parameters = parameters
        self._names = {parameter: name for name, parameter in parameters.items()}
        self._train = train
        self.ranks = ranks
        # Stage 0 in bf16 takes a step with zero gradients while it is built; without a learning rate it moves nothing.
        self._optimizer = MaskedAdamW(
            _decay_groups(parameters, train.weight_decay), lr=0.0, betas=train.betas, eps=train.eps, weight_decay=0.0
        )
        exact = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self._engine, *_ = deepspeed.initialize(
            model=module.to(ranks.info.device), optimizer=self._optimizer, config=deepspeed_config
        )
        self._scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
        self._mask: MaskTable | None = None
        self._list_shards = list(shards(self._engine, self._names))
        # In bf16 DeepSpeed makes its fp32 weights from rounded ones; what was trained or exported must not lose bits.
        for shard in self._list_shards:
            self._stretch(shard).copy_(exact[shard.name].view(-1)[shard.offset : shard.offset + shard.numel])

    @property
    def module(self) -> nn.Module:
        """The model, to be called directly where no gradient of its weights is wanted."""
        return self._engine.module

    @property
    def accumulation_steps(self) -> int:
        """Micro-steps per optimizer step."""
        return int(self._engine.gradient_accumulation_steps())

    @property
    def zero_stage(self) -> int:
        """ZeRO stage in force."""
        return int(self._engine.zero_optimization_stage())

    def start_domain(self, num_steps: int) -> None:
        """Forget optimizer moments and start the learning-rate schedule anew."""
        self._optimizer.reset_state()
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"] = self._train.learning_rate
        self._scheduler = get_scheduler(
            self._train.schedule, self._optimizer, round(self._train.warmup_ratio * num_steps), num_steps
        )

    def __call__(self, *inputs: torch.Tensor) -> Any:
        """Forward pass for training."""
        return self._engine(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        """Backward pass of one micro-step; DeepSpeed averages over micro-steps and ranks."""
        self._engine.backward(loss)

    def step(self, *, measure_norm: bool = False) -> torch.Tensor | float | None:
        """End one micro-step; at an accumulation boundary clip, step the optimizer and advance the schedule.

        Returns:
            Norm of the averaged gradient before clipping when `measure_norm` asks for it at a boundary, else None.
        """
        assert self._scheduler is not None, "start_domain comes before step"
        at_boundary = self._engine.is_gradient_accumulation_boundary()
        norm = self._unsharded_norm() if measure_norm and at_boundary else None
        self._engine.step()
        if not at_boundary:
            return None
        self._scheduler.step()
        return gradient_norm(self._engine) if measure_norm and norm is None else norm

    def learning_rate(self) -> float:
        """Learning rate of the next optimizer step."""
        return float(self._optimizer.param_groups[0]["lr"])

    def protect(self, layout: UnitLayout, importance: Importance, softmask: SoftmaskConfig) -> None:
        """Soft-mask all further steps by this importance (group -> (L, U)), replacing an earlier one."""
        if self._mask is None:
            self._mask = self._install_mask(layout, softmask)
        self._mask.load(importance)

    def release_gathered_weights(self) -> None:
        """To be called after `torch.autograd.grad` through `module`; frees weights that ZeRO-3 left gathered."""
        release_gathered_weights(self._engine)

    def fp32_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole fp32 weight) of every parameter in turn, on every rank; a collective per parameter."""
        for name, parameter in self._parameters.items():
            yield name, full_fp32_weight(self._engine, parameter)

    def shards(self) -> list[Shard]:
        """This rank's shards of the fp32 weights."""
        return self._list_shards

    def snapshot(self) -> list[torch.Tensor]:
        """Copies of this rank's fp32 shards in host memory, for `restore`."""
        return [self._stretch(shard).cpu().clone() for shard in self._list_shards]

    def restore(self, snapshot: list[torch.Tensor]) -> None:
        """Put all weights back to a snapshot."""
        for shard, saved in zip(self._list_shards, snapshot, strict=True):
            self._stretch(shard).copy_(saved)
        refresh_weights(self._engine)

    def close(self) -> None:
        """Free hooks and buffers."""
        self._engine.destroy()

    @staticmethod
    def _stretch(shard: Shard) -> torch.Tensor:
        return shard.flat.data.view(-1)[shard.start : shard.start + shard.numel]

    def _install_mask(self, layout: UnitLayout, softmask: SoftmaskConfig) -> MaskTable:
        on_update = softmask.apply_to == "update"
        table = MaskTable(
            layout,
            readers=softmask.readers,
            shared_scale=softmask.shared_scale,
            device=self._list_shards[0].flat.device if on_update and self._list_shards else self.ranks.info.device,
        )
        if on_update:
            self._optimizer.set_pieces(self._masked_pieces(table, layout))
        else:
            for name, mask in table.masks.items():
                _scale_gradient(self._parameters[name], mask.importance, layout.shapes[name])
        return table

    def _masked_pieces(self, table: MaskTable, layout: UnitLayout) -> dict[torch.Tensor, list[Piece]]:
        pieces: dict[torch.Tensor, list[Piece]] = {}
        for shard in self._list_shards:
            if shard.name in table.masks:
                pieces.setdefault(shard.flat, []).extend(
                    pieces_of_stretch(
                        table.masks[shard.name],
                        flat_start=shard.start,
                        offset=shard.offset,
                        numel=shard.numel,
                        num_columns=layout.shapes[shard.name][1],
                    )
                )
        return pieces

    def _unsharded_norm(self) -> torch.Tensor | None:
        # fp32 at stage 0 clips without keeping the norm; everywhere else DeepSpeed keeps it.
        if self._engine.optimizer is not self._optimizer:
            return None
        gradients = [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]
        return nn.utils.get_total_norm(gradients)


def _decay_groups(parameters: dict[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; vectors (biases, normalisation) do not."""
    matrices = [p for p in parameters.values() if p.dim() > 1]
    vectors = [p for p in parameters.values() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _scale_gradient(parameter: nn.Parameter, importance: Any, shape: tuple[int, int]) -> None:
    """Hook: gradient <- (1 - I) * gradient before DeepSpeed reduces and clips it (the published form)."""

    def scale(gradient: torch.Tensor) -> torch.Tensor:
        # Out of place and in the gradient's own dtype: DeepSpeed may hand in an aliased or expanded tensor.
        scaled = gradient.float().reshape(shape) * (1.0 - importance())
        return scaled.to(gradient.dtype).view(gradient.shape)

    parameter.register_hook(scale)
