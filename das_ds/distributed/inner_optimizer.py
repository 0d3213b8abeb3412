"""The optimizer of a run by its name in the config."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from das_ds.config import TrainConfig
from das_ds.distributed.optimizer import MaskedAdamW, ProtectedOptimizer, SoftUpdated
from das_ds.errors import ConfigError


def build_optimizer(parameters: dict[str, nn.Parameter], train: TrainConfig, *, on_host: bool) -> ProtectedOptimizer:
    """The optimizer that `train.optimizer` names, with learning rate 0: the schedule of a domain sets it.

    Stage 0 in bf16 takes a step with zero gradients while the engine is built; without a learning rate it moves
    nothing.

    Args:
        parameters: name -> parameter.
        train: optimisation settings.
        on_host: whether the fp32 shards are in host memory.

    Raises:
        ConfigError: an optimizer that does not run there.
    """
    groups = _decay_groups(parameters, train.weight_decay)
    if train.optimizer == "adamw":
        return MaskedAdamW(groups, lr=0.0, betas=train.betas, eps=train.eps, weight_decay=0.0)
    if train.optimizer == "cpu_adam":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        if not on_host:
            raise ConfigError(
                "train.optimizer: found cpu_adam, which steps weights in host memory, but zero_optimization has no "
                "offload_optimizer; allowed here: adamw, lion"
            )
        adam = DeepSpeedCPUAdam(groups, lr=0.0, betas=train.betas, eps=train.eps, weight_decay=0.0, adamw_mode=True)
        return SoftUpdated(adam, lambda: _forget_powers(adam))
    return SoftUpdated(_lion(groups, train, on_host=on_host))


def _forget_powers(adam: Any) -> None:
    """Make DeepSpeedCPUAdam compute the powers of its betas anew, by a step on one number with other betas.

    It multiplies those of the step before, which a run that continues does not have and would round differently.
    """
    nothing = [torch.zeros(1) for _ in range(4)]
    adam.ds_opt_adam.adam_update(adam.opt_id, 1, 0.0, 0.0, 0.0, 1.0, 0.0, False, *nothing)


def _lion(groups: list[dict[str, Any]], train: TrainConfig, *, on_host: bool) -> torch.optim.Optimizer:
    from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion

    lion = DeepSpeedCPULion if on_host else FusedLion
    return lion(groups, lr=0.0, betas=train.betas, weight_decay=0.0)


def _decay_groups(parameters: dict[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; vectors (biases, normalisation) do not."""
    # A parameter that was born as a ZeRO-3 shard is an empty vector; its shape is in ds_shape.
    is_matrix = {p: len(getattr(p, "ds_shape", p.shape)) > 1 for p in parameters.values()}
    matrices = [p for p in parameters.values() if is_matrix[p]]
    vectors = [p for p in parameters.values() if not is_matrix[p]]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
