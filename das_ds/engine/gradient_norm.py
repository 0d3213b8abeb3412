"""The norm of the averaged gradient, measured once per optimizer step; a step whose norm is not finite is skipped.

DeepSpeed 0.19.8 goes through the gradients tensor by tensor, once for values that are not finite and once for their
norms in float64, and makes the host wait for each of the two; in bf16 at stage 0 and under offload it makes it wait for
every single parameter. The square of a value that is not finite is not finite either, so one norm answers both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import nn

from das_ds.engine.zero import low_high_pairs, record_unfused_norm, replace_gradient_norm, wraps_optimizer

ROW_ELEMENTS = 256
"""Elements that a CPU sums in float32; the sums of rows are summed in float64."""

SetGradScale = Callable[[torch.Tensor | None], None]


class GradientNorm:
    """Measures the norms of an engine's gradients, clips by them, and gives them back.

    Args:
        engine: DeepSpeed's, whose own norms are replaced.
        parameters: everything that is trained.
        set_grad_scale: receives the divisor of the next step's gradients (loss scale times clipping factor), a scalar
            on their device, or None for 1. None in its place: the optimizer cannot divide, and gradients are divided
            before the step.
    """

    def __init__(
        self, engine: DeepSpeedEngine, parameters: Iterable[nn.Parameter], set_grad_scale: SetGradScale | None = None
    ) -> None:
        self._engine = engine
        self._parameters = list(parameters)
        self._set_grad_scale = set_grad_scale
        self._unwrapped: torch.Tensor | None = None
        is_sharded = replace_gradient_norm(
            engine, self._reduce_over_ranks, None if set_grad_scale is None else self._pass_on_divisor
        )
        optimizer: Any = engine.optimizer
        if isinstance(optimizer, FP16_UnfusedOptimizer):
            optimizer.step = self._step_in_16_bits
        elif not is_sharded:
            engine.clip_fp32_gradients = self._clip_unwrapped

    def measure_unwrapped(self) -> torch.Tensor | None:
        """The norm where DeepSpeed wraps no optimizer (fp32 at stage 0), to be measured before a step; None elsewhere,
        where the step measures it."""
        if wraps_optimizer(self._engine):
            return None
        if self._set_grad_scale is not None:
            self._set_grad_scale(None)
        self._unwrapped = total_norm(parameter.grad for parameter in self._parameters)
        return self._unwrapped

    def last(self) -> torch.Tensor | float | None:
        """Norm of the last step's averaged gradient before clipping; infinite where it was not finite."""
        if self._unwrapped is not None:
            return self._unwrapped
        norm: torch.Tensor | float | None = self._engine.get_global_grad_norm()
        return norm

    def _reduce_over_ranks(
        self, gradients: Iterable[torch.Tensor | None], group: dist.ProcessGroup, device: torch.device
    ) -> torch.Tensor:
        norm = total_norm(gradients)
        if dist.get_world_size(group) > 1:
            # In float64, in which the square of every float32 norm is in range.
            square = norm.to(self._engine.device).double().square()
            dist.all_reduce(square, group=group)
            norm = square.sqrt().float()
        return torch.where(norm.isfinite(), norm, torch.inf).to(device)

    def _pass_on_divisor(self, _: Any, scaled_norm: torch.Tensor | None) -> None:
        """In place of DeepSpeed's pass over all gradients: the optimizer divides each as it reads it."""
        optimizer: Any = self._engine.optimizer
        assert self._set_grad_scale is not None and scaled_norm is not None, "installed where both exist"
        if optimizer.clip_grad == 0.0 and optimizer.loss_scale == 1.0:
            self._set_grad_scale(None)
            return
        divisor = torch.full_like(scaled_norm, optimizer.loss_scale)
        if optimizer.clip_grad > 0.0:
            divisor *= _clipping_divisor(scaled_norm / optimizer.loss_scale, optimizer.clip_grad)
        self._set_grad_scale(divisor)

    def _clip_unwrapped(self) -> None:
        assert self._unwrapped is not None, "measure_unwrapped comes before a step"
        self._clip(self._unwrapped, self._engine.gradient_clipping(), self._parameters)

    def _clip(self, norm: torch.Tensor, max_norm: float, parameters: Iterable[nn.Parameter | torch.Tensor]) -> None:
        if self._set_grad_scale is not None:
            self._set_grad_scale(_clipping_divisor(norm, max_norm))
        else:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)

    def _step_in_16_bits(self, closure: Any = None) -> bool:
        """`FP16_UnfusedOptimizer.step` without loss scale, which bf16 does not have; whether it was skipped."""
        optimizer: Any = self._engine.optimizer
        pairs = list(low_high_pairs(optimizer))
        norm = total_norm(low.grad for low, _ in pairs)
        if record_unfused_norm(optimizer, norm):
            return True
        for low, high in pairs:
            high.grad = torch.zeros_like(high) if low.grad is None else low.grad.to(high.dtype)
        if optimizer.clip_grad > 0.0:
            self._clip(norm, optimizer.clip_grad, [high for _, high in pairs])
        elif self._set_grad_scale is not None:
            self._set_grad_scale(None)
        optimizer.optimizer.step()
        for _, high in pairs:
            high.grad = None
        with torch.no_grad():
            torch._foreach_copy_([low for low, _ in pairs], [high for _, high in pairs])
        return False


def total_norm(gradients: Iterable[torch.Tensor | None]) -> torch.Tensor:
    """Euclidean norm of all gradients together, a float32 scalar on their device; 0 where there are none.

    A GPU sums squares in float32 as a tree, in one launch for many tensors. A CPU would sum them one after the other:
    the norm of 10^8 values is then wrong by a hundredth. There float32 sums end after `ROW_ELEMENTS`, which costs
    nothing, and are summed in float64.

    Args:
        gradients: of any float type, all on one device; None: no gradient.
    """
    present = [gradient.detach() for gradient in gradients if gradient is not None and gradient.numel()]
    if not present:
        return torch.zeros(())
    if present[0].device.type == "cpu":
        norms = [norm for gradient in present for norm in _row_norms(gradient.reshape(-1))]
    else:
        norms = list(torch._foreach_norm(present, 2, dtype=torch.float32))
    return torch.linalg.vector_norm(torch.cat([norm.view(-1) for norm in norms]), dtype=torch.float64).float()


def _row_norms(gradient: torch.Tensor) -> Iterator[torch.Tensor]:
    """Norms of a flat gradient's rows of `ROW_ELEMENTS`, and of the remainder at its end."""
    end_of_rows = gradient.numel() // ROW_ELEMENTS * ROW_ELEMENTS
    if end_of_rows:
        yield torch.linalg.vector_norm(gradient[:end_of_rows].view(-1, ROW_ELEMENTS), dim=1, dtype=torch.float32)
    if end_of_rows < gradient.numel():
        yield torch.linalg.vector_norm(gradient[end_of_rows:], dtype=torch.float32)


def _clipping_divisor(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    return torch.clamp((norm + 1e-6) / max_norm, min=1.0)
