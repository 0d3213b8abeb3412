"""ZeRO's internals (DeepSpeed 0.19.8) at stages 0 to 3, in fp32, bf16 and fp16, with or without offload.

No other file knows them, but for how a parameter becomes a ZeRO-3 shard (`sharded_init.py`), how another is put
in its place (`weight_snapshot.py`) and how gradients are clipped (`gradient_norm.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import safe_get_full_fp32_param

from das_ds.distributed.state import Shard
from das_ds.errors import ConfigError


def shards(engine: DeepSpeedEngine, names: dict[torch.nn.Parameter, str]) -> Iterator[Shard]:
    """This rank's shards of all named parameters.

    At stages 1 to 3 the shards of all ranks cover each parameter once; at stage 0 every rank has all of it.

    Raises:
        ConfigError: a DeepSpeed optimizer wrapper whose layout das_ds does not know.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        yield from _stage3_shards(optimizer, names)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        yield from _stage12_shards(optimizer, names)
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        for low, high in low_high_pairs(optimizer):
            yield Shard(names[low], high, 0, 0, high.numel())
    elif isinstance(optimizer, torch.optim.Optimizer):
        for parameter, name in names.items():
            yield Shard(name, parameter, 0, 0, parameter.numel())
    else:
        raise ConfigError(
            f"deepspeed: this file makes DeepSpeed wrap the optimizer in {type(optimizer).__name__}, whose shards "
            "das_ds cannot mask; use ZeRO stage 0 to 3 without data_types.grad_accum_dtype at stage 1"
        )


def flats_by_parameter(engine: DeepSpeedEngine, names: dict[torch.nn.Parameter, str]) -> dict[str, torch.Tensor]:
    """Parameter -> the flat tensor that it is stepped in, also where this rank has no part of it.

    Ranks step flat tensors that hold the same parameters at the same time.
    """
    optimizer: Any = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        groups = {
            name: optimizer.grad_position[optimizer.get_param_id(parameter)][0] for parameter, name in names.items()
        }
        return {name: optimizer.fp32_partitioned_groups_flat[group] for name, group in groups.items()}
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        flats = optimizer.single_partition_of_fp32_groups
        return {names[p]: flats[group] for group, members in enumerate(optimizer.bit16_groups) for p in members}
    return {shard.name: shard.flat for shard in shards(engine, names)}


def get_gradients(
    engine: DeepSpeedEngine, shards: list[Shard], parameters: dict[str, torch.nn.Parameter]
) -> Callable[[], list[torch.Tensor]]:
    """How to get at the averaged gradient of each shard's elements (1-d), between backward pass and step.

    They are views of what norm and update are taken from: writing to them changes both.
    """
    optimizer: Any = engine.optimizer
    owners = [parameters[shard.name] for shard in shards]
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        if optimizer.offload_optimizer:
            return lambda: [s.flat.grad.view(-1)[s.start : s.start + s.numel] for s in shards]  # type: ignore[union-attr]
        places = {id(p): (g, i) for g, group in enumerate(optimizer.fp16_groups) for i, p in enumerate(group)}
        found = [(*places[id(owner)], shard.numel) for owner, shard in zip(owners, shards, strict=True)]
        return lambda: [optimizer.averaged_gradients[g][i].view(-1)[:numel] for g, i, numel in found]
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        mapped: list[Any] = owners
        return lambda: [p._hp_mapping.get_lp_grad_fragment(p._index_in_param_group).view(-1) for p in mapped]
    return lambda: [owner.grad.view(-1) for owner in owners]  # type: ignore[union-attr]


def forget_gradients(engine: DeepSpeedEngine) -> None:
    """Drop what a step that was not applied left behind: at stages 1 and 2 under offload DeepSpeed keeps the gradients
    and would add those of the next step to them."""
    optimizer: Any = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer) and optimizer.cpu_offload:
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None


def refresh_weights(engine: DeepSpeedEngine) -> None:
    """Make the weights that the forward pass reads equal to the fp32 shards, after these were written from outside."""
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        for sub_group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        optimizer.update_lp_params()
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        for low, high in low_high_pairs(optimizer):
            low.data.copy_(high.data)


def full_fp32_weight(engine: DeepSpeedEngine, parameter: torch.nn.Parameter) -> torch.Tensor:
    """The whole fp32 master weight of one parameter, on every rank; a collective."""
    optimizer = engine.optimizer
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        return next(high for low, high in low_high_pairs(optimizer) if low is parameter).detach()
    if isinstance(optimizer, DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3 | BF16_Optimizer):
        weight: torch.Tensor = safe_get_full_fp32_param(parameter)
        return weight.detach().view(getattr(parameter, "ds_shape", parameter.shape))
    return parameter.detach()


def release_gathered_weights(engine: DeepSpeedEngine) -> None:
    """Give back what a pass through `engine.module` gathered under ZeRO-3: the gated part of a graph that
    `torch.autograd.grad` never walks to its end leaves its weights whole."""
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
        engine.optimizer.parameter_offload.release_backward_leftovers()


def _stage3_shards(optimizer: Any, names: dict[Any, str]) -> Iterator[Shard]:
    for parameter, name in names.items():
        group, start, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
        offset = optimizer._get_param_partition_rank(parameter) * padded
        # The last rank's partition is padded behind the end of the parameter.
        numel = min(padded, parameter.ds_numel - offset)
        if numel > 0:
            yield Shard(name, optimizer.fp32_partitioned_groups_flat[group], start, offset, numel)


def _stage12_shards(optimizer: Any, names: dict[torch.nn.Parameter, str]) -> Iterator[Shard]:
    for group, parameters in enumerate(optimizer.bit16_groups):
        flat = optimizer.single_partition_of_fp32_groups[group]
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is not None:
                high, low = mapping.hp_fragment_address, mapping.lp_fragment_address
                yield Shard(names[parameter], flat, high.start, low.start, low.numel)


def low_high_pairs(optimizer: FP16_UnfusedOptimizer) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """(what runs forward, the fp32 tensor that is stepped) of every parameter, at stage 0 in 16 bits."""
    for low_group, high_group in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        yield from zip(low_group, high_group, strict=True)
