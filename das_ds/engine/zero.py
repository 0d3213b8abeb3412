"""DeepSpeed's internals (0.19.8), all of them: ZeRO stages 0 to 3, in fp32, bf16 and fp16, with or without offload.

No other file of das_ds touches a private attribute of DeepSpeed or the `ds_*` attributes of its parameters.

Shape legend: F elements of a flat tensor of the optimizer, n elements of a shard.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

from das_ds.distributed.state import Shard
from das_ds.errors import ConfigError

# Parameters.


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 manages a parameter, which is then an empty vector between passes."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of the complete parameter, also where ZeRO-3 has left an empty vector of it."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def full_numel(parameter: nn.Parameter) -> int:
    """Number of elements of the complete parameter."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


# Shards and gradients.


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
    """Parameter -> the flat tensor that it is stepped in, also where this rank has no shard of it.

    All ranks step the flat tensors in one order, those with the same parameters at the same time.
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
    """A function that gives the averaged gradient (n,) of each shard's elements, between backward pass and step.

    They are views of what norm and update are computed from: writing to them changes both. Under offload they are in
    host memory, and the host waits until they have arrived.
    """
    find = _find_gradients(engine, shards, parameters)
    if not _offloads_gradients(engine.optimizer):
        return find

    def find_arrived() -> list[torch.Tensor]:
        _wait_for_copies()
        return find()

    return find_arrived


def _offloads_gradients(optimizer: Any) -> bool:
    return bool(
        (isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3) and optimizer.offload_optimizer)
        or (isinstance(optimizer, DeepSpeedZeroOptimizer) and optimizer.cpu_offload)
    )


def _wait_for_copies() -> None:
    """DeepSpeed copies gradients to pinned memory without waiting, and waited where it measured their norms itself."""
    get_accelerator().synchronize()


def _find_gradients(
    engine: DeepSpeedEngine, shards: list[Shard], parameters: dict[str, torch.nn.Parameter]
) -> Callable[[], list[torch.Tensor]]:
    optimizer: Any = engine.optimizer
    owners: list[Any] = [parameters[shard.name] for shard in shards]
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3) and optimizer.offload_optimizer:
        return lambda: [shard.flat.grad.view(-1)[shard.span] for shard in shards]  # type: ignore[union-attr]
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return _stage3_gradients(optimizer, owners, [shard.numel for shard in shards])
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return lambda: [p._hp_mapping.get_lp_grad_fragment(p._index_in_param_group).view(-1) for p in owners]
    return lambda: [owner.grad.view(-1) for owner in owners]


def drop_gradients(engine: DeepSpeedEngine) -> None:
    """Drop the gradients of a step that was not applied: at stages 1 and 2 under offload DeepSpeed keeps them and
    would add those of the next step."""
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
    """The complete fp32 master weight of one parameter, on every rank; a collective."""
    optimizer = engine.optimizer
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        return next(high for low, high in low_high_pairs(optimizer) if low is parameter).detach()
    if isinstance(optimizer, DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3 | BF16_Optimizer):
        weight: torch.Tensor = safe_get_full_fp32_param(parameter)
        return weight.detach().view(full_shape(parameter))
    return parameter.detach()


def release_gathered_weights(engine: DeepSpeedEngine) -> None:
    """Free the weights that a pass through `engine.module` gathered under ZeRO-3: `torch.autograd.grad` walks only the
    gated part of the graph, so that DeepSpeed's backward hooks do not free all of them."""
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
        engine.optimizer.parameter_offload.release_backward_leftovers()


def _stage3_shards(optimizer: Any, names: dict[Any, str]) -> Iterator[Shard]:
    for parameter, name in names.items():
        group, flat_start, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
        param_start = optimizer._get_param_partition_rank(parameter) * padded
        # The last rank's partition is padded after the end of the parameter.
        numel = min(padded, parameter.ds_numel - param_start)
        if numel > 0:
            yield Shard(name, optimizer.fp32_partitioned_groups_flat[group], flat_start, param_start, numel)


def _stage3_gradients(optimizer: Any, owners: list[Any], numels: list[int]) -> Callable[[], list[torch.Tensor]]:
    positions = {
        id(parameter): (group, index)
        for group, parameters in enumerate(optimizer.fp16_groups)
        for index, parameter in enumerate(parameters)
    }
    # Averaged gradients are new tensors in every step; what stays is where DeepSpeed lists them, padded.
    indices = [(*positions[id(owner)], numel) for owner, numel in zip(owners, numels, strict=True)]
    return lambda: [optimizer.averaged_gradients[group][i].view(-1)[:numel] for group, i, numel in indices]


def _stage12_shards(optimizer: Any, names: dict[torch.nn.Parameter, str]) -> Iterator[Shard]:
    for group, parameters in enumerate(optimizer.bit16_groups):
        flat = optimizer.single_partition_of_fp32_groups[group]
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is not None:
                # The same elements in the flat fp32 tensor (high precision) and in the parameter (low precision).
                in_flat = mapping.hp_fragment_address
                in_parameter = mapping.lp_fragment_address
                yield Shard(names[parameter], flat, in_flat.start, in_parameter.start, in_parameter.numel)


def low_high_pairs(optimizer: FP16_UnfusedOptimizer) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """(what runs forward, the fp32 tensor that is stepped) of every parameter, at stage 0 in 16 bits."""
    for low_group, high_group in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        yield from zip(low_group, high_group, strict=True)


# Steps.


@contextmanager
def gradient_accumulation(engine: DeepSpeedEngine, num_micro_steps: int) -> Iterator[None]:
    """Inside, a step ends after so many micro-steps; entered and left between steps."""
    config: Any = engine._config
    saved_steps = config.gradient_accumulation_steps
    saved_position = engine.micro_steps
    config.gradient_accumulation_steps = num_micro_steps
    # DeepSpeed counts micro-steps from the start of training and takes the remainder.
    engine.micro_steps = 0
    try:
        yield
    finally:
        config.gradient_accumulation_steps = saved_steps
        engine.micro_steps = saved_position


@contextmanager
def without_clipping(engine: DeepSpeedEngine) -> Iterator[None]:
    """Inside, steps see gradients as they are; for measuring, never for training."""
    holders: list[tuple[Any, str]] = [(engine._config, "gradient_clipping"), (engine.optimizer, "clip_grad")]
    saved = [(holder, name, getattr(holder, name)) for holder, name in holders if hasattr(holder, name)]
    for holder, name, _ in saved:
        setattr(holder, name, 0.0)
    try:
        yield
    finally:
        for holder, name, value in saved:
            setattr(holder, name, value)


def freeze_loss_scale(optimizer: Any) -> None:
    """Keep DeepSpeed from changing the loss scale within a step; the caller updates it after the step."""
    optimizer._update_scale = lambda has_overflow=False: None


MeasureNorm = Callable[[Iterable[torch.Tensor | None], dist.ProcessGroup, torch.device], torch.Tensor]
"""(this rank's gradients, ranks that share the model, where the optimizer is) -> their norm over all ranks."""
DivideGradients = Callable[[Any, torch.Tensor | None], None]
"""(DeepSpeed's gradients, norm of the gradients times the loss scale) -> None, in place of unscaling and clipping."""


def wraps_optimizer(engine: DeepSpeedEngine) -> bool:
    """Whether DeepSpeed steps through an optimizer of its own: everywhere but at stage 0 in fp32."""
    return isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3 | DeepSpeedZeroOptimizer | FP16_UnfusedOptimizer)


def replace_gradient_norm(engine: DeepSpeedEngine, measure: MeasureNorm, divide: DivideGradients | None) -> bool:
    """Make a ZeRO optimizer take the norm of its gradients from `measure`, and look for no overflow of its own.

    Args:
        engine: at any stage.
        measure: see `MeasureNorm`.
        divide: takes over unscaling and clipping; None: DeepSpeed does it.

    Returns:
        Whether there was a ZeRO optimizer; False at stage 0.
    """
    optimizer: Any = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        _replace_norm_stage3(optimizer, measure)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        if not optimizer.compute_grad_norm:
            return True
        _replace_norm_stage12(optimizer, measure)
    else:
        return False
    if divide is not None:
        optimizer.unscale_and_clip_grads = divide
    return True


def _replace_norm_stage12(optimizer: Any, measure: MeasureNorm) -> None:
    flats = optimizer.single_partition_of_fp32_groups

    def gradients() -> Iterator[torch.Tensor | None]:
        if optimizer.cpu_offload:
            _wait_for_copies()
            return (flat.grad for flat in flats)
        return (g for i in range(len(flats)) for g in optimizer.averaged_gradients[i] if not _is_padding(g))

    group = optimizer.dp_process_group
    optimizer.scaled_global_norm = lambda norm_type=2: measure(gradients(), group, flats[0].device)
    optimizer.check_overflow = _do_nothing
    # Under offload gradients are measured once they have arrived, not parameter by parameter on their way.
    optimizer.set_norm_for_param_grad_in_gpu = _do_nothing
    optimizer.update_offload_overflow_tracker = _do_nothing


def _replace_norm_stage3(optimizer: Any, measure: MeasureNorm) -> None:
    flats = optimizer.fp32_partitioned_groups_flat

    def gradients() -> Iterator[torch.Tensor | None]:
        if optimizer.offload_optimizer:
            _wait_for_copies()
            return (flat.grad for flat in flats)
        return (gradient for i in range(len(flats)) for gradient in optimizer.averaged_gradients[i])

    group = optimizer._get_param_partition_group(optimizer.fp16_groups[0][0])
    optimizer._get_norm_groups = lambda: [measure(gradients(), group, flats[0].device)]
    optimizer.check_overflow = _do_nothing
    optimizer._constant_buffered_norm2 = _do_nothing


def record_unfused_norm(optimizer: FP16_UnfusedOptimizer, norm: torch.Tensor) -> bool:
    """Tell the optimizer of stage 0 in 16 bits the norm of a step's gradients; whether the step is to be skipped."""
    optimizer.overflow = not bool(norm.isfinite())
    if optimizer.overflow:
        optimizer._skip_invalid_grad_norm()
        return True
    optimizer._global_grad_norm = norm
    return False


def _is_padding(gradient: torch.Tensor) -> bool:
    return getattr(gradient, "_zero_padding", False)


def _do_nothing(*_: Any, **__: Any) -> None:
    """In place of what DeepSpeed would do for each parameter, or wait for."""


# Engines of another trainer.


def check_engine(engine: DeepSpeedEngine) -> None:
    """Check that the steps of an engine that another trainer built can be masked.

    Raises:
        ConfigError: its shards are where das_ds does not reach them, or ranks share more than data.
    """
    for key, offload in (
        ("offload_optimizer", engine.zero_offload_optimizer()),
        ("offload_param", engine.zero_offload_param()),
    ):
        device = getattr(offload, "device", "none")
        device = getattr(device, "value", device)
        if device not in ("none", None):
            # DeepSpeed takes the norm of gradients on their way to the host, before they can be masked.
            raise ConfigError(
                f"deepspeed: found zero_optimization.{key}.device {device}, where gradients are measured before they "
                "can be masked; allowed in other trainers: none"
            )
    if getattr(engine, "zenflow", False):
        raise ConfigError("deepspeed: found zenflow, whose steps are not at one time; expected a config without it")
    group_size = dist.get_world_size(engine.data_parallel_group)
    if group_size != dist.get_world_size():
        raise ConfigError(
            f"deepspeed: found {group_size} data-parallel ranks of {dist.get_world_size()}, expected all; masks do not "
            "know tensor, pipeline or sequence parallelism"
        )
    if not engine.managed_gradient_accumulation():
        raise ConfigError("deepspeed: found managed_gradient_accumulation false, expected true")


def base_optimizer(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    """The optimizer that steps the flat tensors."""
    optimizer: torch.optim.Optimizer = engine.basic_optimizer
    return optimizer


def call_before_steps(engine: DeepSpeedEngine, function: Callable[[], None]) -> Callable[[], None]:
    """Call a function between backward pass and step of every optimizer step from now on; returns what ends this."""
    step = engine.step

    def masked_step(*args: Any, **kwargs: Any) -> Any:
        if engine.is_gradient_accumulation_boundary():
            function()
        return step(*args, **kwargs)

    engine.step = masked_step
    return lambda: delattr(engine, "step")


@contextmanager
def observing_steps(engine: DeepSpeedEngine, observe: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Inside, steps give each flat tensor with its averaged gradient to `observe`, and change nothing.

    Every backward pass is an optimizer step, without clipping; counters and schedule of the engine stay as they are.

    Args:
        engine: in fp32 or bf16, where no loss scale would change.
        observe: called once for every flat tensor and step; reads `grad`.
    """
    base: Any = base_optimizer(engine)
    names = ("global_steps", "global_samples", "skipped_steps", "lr_scheduler", "_is_gradient_accumulation_boundary")
    saved = {name: getattr(engine, name) for name in names}
    engine.lr_scheduler = None
    engine.set_gradient_accumulation_boundary(True)

    def observe_all(closure: Any = None) -> None:
        for group in base.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    observe(flat)

    had_step = "step" in vars(base)
    step = base.step
    base.step = observe_all
    try:
        with without_clipping(engine), gradient_accumulation(engine, 1):
            yield
    finally:
        if had_step:
            base.step = step
        else:
            del base.step
        for name, value in saved.items():
            setattr(engine, name, value)


# Sharded initialization.


class Zero3Init:
    """Turns complete parameters into ZeRO-3 parameters, one at a time.

    Args:
        deepspeed_config: merged settings of stage 3.
    """

    def __init__(self, deepspeed_config: dict[str, Any]) -> None:
        # Given a module, even one without parameters, DeepSpeed installs its linear map, as it otherwise does later.
        self._init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=deepspeed_config)
        self.dtype: torch.dtype = self._init.dtype
        """Of the weights that the forward pass reads."""
        self.device: torch.device = self._init.local_device

    def partition(self, parameter: Any) -> None:
        """Keep this rank's shard of a parameter and free the rest."""
        self._init._convert_to_deepspeed_param(parameter)
        parameter.partition()


# Swapping weights under ZeRO-3.


class Zero3Swap:
    """Lets ZeRO-3 gather other weights than the present ones.

    DeepSpeed records the order in which a pass uses modules, and prefetches in later passes of that order. A forward
    pass alone, between two of training, would invalidate their record and its own every time: it gets its own
    coordinator. Parameters below `stage3_param_persistence_threshold` stay gathered and are exchanged complete.

    Args:
        engine: at stage 3.
        parameters: that change.
    """

    def __init__(self, engine: DeepSpeedEngine, parameters: Iterable[nn.Parameter]) -> None:
        optimizer: Any = engine.optimizer
        self._offload = optimizer.parameter_offload
        self._parameters: list[Any] = list(parameters)
        self.persistent: list[Any] = [parameter for parameter in self._parameters if parameter.ds_persist]
        """Parameters that stay gathered."""
        self._statuses: list[Any] = []
        # With its own record, even where there is none to invalidate yet.
        self._coordinator = copy.copy(self._offload.param_coordinator)
        if self._coordinator.is_invalid_trace():
            self._coordinator._clear_trace_structures()
        else:
            self._coordinator._invalidate_trace()

    def shards(self) -> tuple[list[torch.Tensor], list[int]]:
        """This rank's shard of every parameter as the forward pass reads it, and its first element."""
        shards = [parameter.ds_tensor for parameter in self._parameters]
        ranks = [parameter.ds_zero_partition_rank for parameter in self._parameters]
        return shards, [rank * shard.ds_numel for rank, shard in zip(ranks, shards, strict=True)]

    def begin(self) -> None:
        """To be called before the weights are exchanged."""
        self._release()
        # After a step that overflowed even persistent parameters are partitioned until the next pass.
        self._statuses = [parameter.ds_status for parameter in self.persistent]
        for parameter in self.persistent:
            parameter.ds_status = ZeroParamStatus.AVAILABLE
        self._exchange_coordinators()

    def end(self) -> None:
        """To be called after they were exchanged back."""
        self._exchange_coordinators()
        for parameter, status in zip(self.persistent, self._statuses, strict=True):
            parameter.ds_status = status
        self._release()

    def _exchange_coordinators(self) -> None:
        self._offload.param_coordinator, self._coordinator = self._coordinator, self._offload.param_coordinator

    def _release(self) -> None:
        """Free weights that a pass left gathered, which the next would take for its own."""
        for parameter in self._parameters:
            if parameter.ds_status == ZeroParamStatus.AVAILABLE and not parameter.ds_persist:
                parameter.partition()


class _IdleCoordinator:
    """Gathers and releases nothing, for weights that are gathered already."""

    def is_record_trace(self) -> bool:
        """DeepSpeed's record of the order of modules stays that of training."""
        return False

    trace_prologue = fetch_sub_module = release_sub_module = reset_step = _do_nothing


@contextmanager
def gathered_weights(engine: DeepSpeedEngine) -> Iterator[None]:
    """Inside, every rank has all weights, which passes without gradients do not gather again; a collective.

    At ZeRO stages 0 to 2 that is always so.
    """
    if not is_zero3(engine):
        yield
        return
    release_gathered_weights(engine)
    offload: Any = engine.optimizer.parameter_offload
    parameters: list[Any] = list(engine.module.parameters())
    missing = [parameter for parameter in parameters if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE]
    coordinator = offload.param_coordinator
    with deepspeed.zero.GatheredParameters(missing):
        offload.param_coordinator = _IdleCoordinator()
        try:
            yield
        finally:
            offload.param_coordinator = coordinator


def is_zero3(engine: DeepSpeedEngine) -> bool:
    """Whether weights are sharded (ZeRO stage 3)."""
    return isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3)
