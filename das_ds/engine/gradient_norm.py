"""The norm of the averaged gradient, taken once per optimizer step; where it is not finite the step is left out.

DeepSpeed 0.19.8 goes through the gradients tensor by tensor, once for numbers that are not finite and once for their
norms in float64, and makes the host wait for each of the two; in bf16 at stage 0 and under offload it makes it wait for
every single parameter. The square of a number that is not finite is not finite either, so that one norm answers both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

from das_ds.engine.zero import low_high_pairs

ROW = 256
"""Elements that are summed in float32 on a CPU; what they give is summed in float64."""

Receive = Callable[[torch.Tensor | None], None]


class GradientNorm:
    """Takes the norms of an engine's gradients, clips by them, and gives them back.

    Args:
        engine: DeepSpeed's, whose own norms are put out of use.
        parameters: everything that is trained.
        receive: takes the divisor of the next step's gradients (loss scale times clipping factor), a scalar beside
            them, or None for 1; None in its place: the optimizer cannot divide, and the gradients are divided instead.
    """

    def __init__(
        self, engine: DeepSpeedEngine, parameters: Iterable[nn.Parameter], receive: Receive | None = None
    ) -> None:
        self._engine, self._parameters, self._receive = engine, list(parameters), receive
        self._unwrapped: torch.Tensor | None = None
        optimizer: Any = engine.optimizer
        if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            self._replace_at_3(optimizer)
        elif isinstance(optimizer, DeepSpeedZeroOptimizer):
            self._replace_at_12(optimizer)
        elif isinstance(optimizer, FP16_UnfusedOptimizer):
            optimizer.step = self._step_in_16_bits
        else:
            engine.clip_fp32_gradients = self._clip_unwrapped

    def measure_unwrapped(self) -> torch.Tensor | None:
        """The norm where DeepSpeed has put nothing around the optimizer (fp32 at stage 0), to be taken before a step;
        None elsewhere, where the step takes it."""
        if isinstance(
            self._engine.optimizer, DeepSpeedZeroOptimizer_Stage3 | DeepSpeedZeroOptimizer | FP16_UnfusedOptimizer
        ):
            return None
        if self._receive is not None:
            self._receive(None)
        self._unwrapped = total_norm(parameter.grad for parameter in self._parameters)
        return self._unwrapped

    def last(self) -> torch.Tensor | float | None:
        """Norm of the last step's averaged gradient before clipping; infinite where it was not finite."""
        if self._unwrapped is not None:
            return self._unwrapped
        norm: torch.Tensor | float | None = self._engine.get_global_grad_norm()
        return norm

    def _replace_at_12(self, optimizer: Any) -> None:
        if not optimizer.compute_grad_norm:
            return
        flats = optimizer.single_partition_of_fp32_groups

        def gradients() -> Iterator[torch.Tensor | None]:
            if optimizer.cpu_offload:
                return (flat.grad for flat in flats)
            return (g for i in range(len(flats)) for g in optimizer.averaged_gradients[i] if not _is_padding(g))

        group = optimizer.dp_process_group
        optimizer.scaled_global_norm = lambda norm_type=2: self._over_ranks(gradients(), group, flats[0].device)
        optimizer.check_overflow = _nothing
        # Under offload the gradients are measured where they have arrived, not parameter by parameter on their way.
        optimizer.set_norm_for_param_grad_in_gpu = _nothing
        optimizer.update_offload_overflow_tracker = _nothing
        if self._receive is not None:
            optimizer.unscale_and_clip_grads = self._hand_over_divisor

    def _replace_at_3(self, optimizer: Any) -> None:
        flats = optimizer.fp32_partitioned_groups_flat

        def gradients() -> Iterator[torch.Tensor | None]:
            if optimizer.offload_optimizer:
                return (flat.grad for flat in flats)
            return (gradient for i in range(len(flats)) for gradient in optimizer.averaged_gradients[i])

        group = optimizer._get_param_partition_group(optimizer.fp16_groups[0][0])
        optimizer._get_norm_groups = lambda: [self._over_ranks(gradients(), group, flats[0].device)]
        optimizer.check_overflow = _nothing
        optimizer._constant_buffered_norm2 = _nothing
        if self._receive is not None:
            optimizer.unscale_and_clip_grads = self._hand_over_divisor

    def _over_ranks(
        self, gradients: Iterable[torch.Tensor | None], group: dist.ProcessGroup, home: torch.device
    ) -> torch.Tensor:
        norm = total_norm(gradients)
        if dist.get_world_size(group) > 1:
            # In float64, in which the square of every float32 norm is in range.
            square = norm.to(self._engine.device).double().square()
            dist.all_reduce(square, group=group)
            norm = square.sqrt().float()
        return torch.where(norm.isfinite(), norm, torch.inf).to(home)

    def _hand_over_divisor(self, _: Any, scaled_norm: torch.Tensor | None) -> None:
        """In place of DeepSpeed's pass over all gradients."""
        optimizer: Any = self._engine.optimizer
        assert self._receive is not None and scaled_norm is not None, "installed where both exist"
        if optimizer.clip_grad == 0.0 and optimizer.loss_scale == 1.0:
            self._receive(None)
            return
        divisor = torch.full_like(scaled_norm, optimizer.loss_scale)
        if optimizer.clip_grad > 0.0:
            divisor *= _clipping_divisor(scaled_norm / optimizer.loss_scale, optimizer.clip_grad)
        self._receive(divisor)

    def _clip_unwrapped(self) -> None:
        assert self._unwrapped is not None, "measure_unwrapped comes before a step"
        self._clip(self._unwrapped, self._engine.gradient_clipping(), self._parameters)

    def _clip(self, norm: torch.Tensor, most: float, parameters: Iterable[nn.Parameter | torch.Tensor]) -> None:
        if self._receive is not None:
            self._receive(_clipping_divisor(norm, most))
        else:
            nn.utils.clip_grads_with_norm_(parameters, most, norm)

    def _step_in_16_bits(self, closure: Any = None) -> bool:
        """`FP16_UnfusedOptimizer.step` without loss scale, which bf16 does not have."""
        optimizer: Any = self._engine.optimizer
        norm = total_norm(low.grad for low, _ in low_high_pairs(optimizer))
        optimizer.overflow = not bool(norm.isfinite())
        if optimizer.overflow:
            optimizer._skip_invalid_grad_norm()
            return True
        optimizer._global_grad_norm = norm
        pairs = list(low_high_pairs(optimizer))
        for low, high in pairs:
            high.grad = torch.zeros_like(high) if low.grad is None else low.grad.to(high.dtype)
        if optimizer.clip_grad > 0.0:
            self._clip(norm, optimizer.clip_grad, [high for _, high in pairs])
        elif self._receive is not None:
            self._receive(None)
        optimizer.optimizer.step()
        for _, high in pairs:
            high.grad = None
        with torch.no_grad():
            torch._foreach_copy_([low for low, _ in pairs], [high for _, high in pairs])
        return False


@contextmanager
def without_clipping(engine: DeepSpeedEngine) -> Iterator[None]:
    """Inside, steps see gradients as they are; for measuring, never for training."""
    holders = [(engine._config, "gradient_clipping"), (engine.optimizer, "clip_grad")]
    saved = [(holder, name, getattr(holder, name)) for holder, name in holders if hasattr(holder, name)]
    for holder, name, _ in saved:
        setattr(holder, name, 0.0)
    try:
        yield
    finally:
        for holder, name, value in saved:
            setattr(holder, name, value)


def total_norm(gradients: Iterable[torch.Tensor | None]) -> torch.Tensor:
    """Euclidean norm of all gradients together, a float32 scalar on their device; 0 where there are none.

    A GPU sums squares in float32 as a tree, in one launch for many tensors. A CPU would sum them one after the other:
    10^8 numbers give a norm that is wrong by a hundredth. There, float32 sums end after `ROW` elements, which costs
    nothing, and float64 goes on.

    Args:
        gradients: of any float type, all on one device; None: no gradient.
    """
    found = [gradient.detach() for gradient in gradients if gradient is not None and gradient.numel()]
    if not found:
        return torch.zeros(())
    if found[0].device.type == "cpu":
        norms = [norm for gradient in found for norm in _norms_of_rows(gradient.reshape(-1))]
    else:
        norms = list(torch._foreach_norm(found, 2, dtype=torch.float32))
    return torch.linalg.vector_norm(torch.cat([norm.view(-1) for norm in norms]), dtype=torch.float64).float()


def _norms_of_rows(gradient: torch.Tensor) -> Iterator[torch.Tensor]:
    whole = gradient.numel() // ROW * ROW
    if whole:
        yield torch.linalg.vector_norm(gradient[:whole].view(-1, ROW), dim=1, dtype=torch.float32)
    if whole < gradient.numel():
        yield torch.linalg.vector_norm(gradient[whole:], dtype=torch.float32)


def _clipping_divisor(norm: torch.Tensor, most: float) -> torch.Tensor:
    return torch.clamp((norm + 1e-6) / most, min=1.0)


def _is_padding(gradient: torch.Tensor) -> bool:
    return getattr(gradient, "_zero_padding", False)


def _nothing(*_: Any, **__: Any) -> None:
    """In place of what DeepSpeed would do for each parameter, or wait for."""
