"""Optimizers that DeepSpeed steps on its flat fp32 tensors, with the step of important weights scaled by 1 - I.

The optimizer of a run by its name in the config.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from das_ds.config import ImportanceScore, TrainConfig
from das_ds.distributed.state import Flats
from das_ds.engine.loss_scaler import tf32
from das_ds.engine.mask import RowUpdateMask
from das_ds.errors import ConfigError
from das_ds.functional.importance import importance_score
from das_ds.kernels.masked_adamw import masked_adamw_
from das_ds.kernels.protection import Protection
from das_ds.kernels.soft_update import soft_update_

CHUNK_WINDOWS = 16
"""Windows per step of a foreign optimizer: its old values are a copy of so many and never of a whole shard."""


class MaskedOptimizer(torch.optim.Optimizer, ABC):
    """What both optimizers share: which flat tensor is protected how, and measuring gradients in place of stepping.

    Tensors are known by identity: DeepSpeed swaps its flat tensors in and out of `param_groups` but keeps the objects.
    """

    moment_keys: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    """State by weight that any optimizer here may have."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self._protections: dict[int, Protection] = {}
        self._row_masks: RowUpdateMask | None = None
        self._frozen: dict[int, list[tuple[int, torch.Tensor]]] = {}
        self._sums: Flats | None = None
        self._kind: ImportanceScore = "abs_grad"
        self._is_muted = False
        self.grad_scale: torch.Tensor | None = None

    def protect(self, protections: dict[torch.Tensor, Protection]) -> None:
        """Mask these flat tensors from now on, and no others."""
        self._protections = {id(flat): protection for flat, protection in protections.items()}

    def protect_rows(self, masks: RowUpdateMask | None) -> None:
        """Mask the rows of all updates from now on, by whole matrices; None: no longer."""
        self._row_masks = masks

    @contextmanager
    def freezing(self, stretches: dict[torch.Tensor, list[tuple[int, torch.Tensor]]]) -> Iterator[None]:
        """Inside, a step leaves stretches (start, values) of flat tensors at these values, whatever optimizer steps."""
        self._frozen = {id(flat): parts for flat, parts in stretches.items()}
        try:
            yield
        finally:
            self._frozen = {}

    @contextmanager
    def summing(self, sums: Flats, kind: ImportanceScore) -> Iterator[None]:
        """Inside, a step adds the gradient's `importance_score` to the tensor's sum (F,); weights and moments stay."""
        self._sums, self._kind = sums, kind
        try:
            yield
        finally:
            self._sums = None

    @contextmanager
    def skip_update(self) -> Iterator[None]:
        """Inside, a step changes nothing: DeepSpeed drops the gradients as after any other."""
        self._is_muted = True
        try:
            yield
        finally:
            self._is_muted = False

    def set_grad_scale(self, grad_scale: torch.Tensor | None) -> None:
        """What the gradients of the next step are still to be divided by, a scalar on their device; None: nothing."""
        self.grad_scale = grad_scale

    def reset_state(self) -> None:
        """Forget moments and step counts, as at the start of a new domain."""
        for state in self.state.values():
            for key, value in state.items():
                state[key] = value.zero_() if torch.is_tensor(value) else 0

    def moments(self) -> tuple[dict[str, Flats], dict[str, Any]]:
        """(key -> flat tensor -> (F,) moment as a view, key -> number that all flat tensors share)."""
        by_key: dict[str, Flats] = {}
        numbers: dict[str, Any] = {}
        for param, state in self.state.items():
            for key, value in state.items():
                if _is_elementwise(value, param.numel()):
                    by_key.setdefault(key, {})[param] = value.view(-1)
                else:
                    numbers[key] = value.item() if torch.is_tensor(value) else value
        return by_key, numbers

    def load_moments(self, by_key: dict[str, Flats], numbers: dict[str, Any]) -> None:
        """Continue with these moments, (F,) each; numbers become what this optimizer keeps (a host scalar or int)."""
        for key, flats in by_key.items():
            for param, values in flats.items():
                self.state[param][key] = values.view_as(param)
        for param, state in self.state.items():
            if param in next(iter(by_key.values()), {}):
                state.update({key: self._as_state_value(value) for key, value in numbers.items()})

    def _as_state_value(self, value: float) -> Any:
        return int(value)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step on every parameter that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        if self._is_muted:
            return loss
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                if self._sums is not None:
                    gradient = param.grad.view(-1)
                    # Before it is squared: a scaled gradient's square would have to be divided twice.
                    gradient = gradient if self.grad_scale is None else gradient / self.grad_scale
                    self._sums[param].add_(importance_score(gradient, param.data.view(-1), self._kind))
                else:
                    self._step_masked(param, group)
        return loss

    def _step_masked(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        old = None if self._row_masks is None else self._row_masks.remember(param)
        self._step_one(param, group)
        if self._row_masks is not None and old is not None:
            # TF32 errs by 5e-4 of the update, where the mask leaves a hundredth at the least.
            with tf32(param.device):
                self._row_masks.mask(param, old)
        for start, values in self._frozen.get(id(param), ()):
            param.data.view(-1)[start : start + values.numel()] = values

    def _protection(self, param: torch.Tensor) -> Protection:
        if id(param) not in self._protections:
            self._protections[id(param)] = Protection(param.numel())
        return self._protections[id(param)]

    @abstractmethod
    def _step_one(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        """Step a flat tensor, its important weights less."""


class MaskedAdamW(MaskedOptimizer):
    """AdamW with decoupled weight decay, stepped and masked in one pass (see `kernels.masked_adamw`).

    State keys are those of `torch.optim.AdamW` (`step`, `exp_avg`, `exp_avg_sq`), which DeepSpeed's checkpoints know.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _as_state_value(self, value: float) -> Any:
        # On the host, as in torch's own AdamW: reading it makes no step wait for the device.
        return torch.tensor(float(value), dtype=torch.float32)

    def _step_one(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if "step" not in state:
            state["step"] = self._as_state_value(0)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        state["step"] += 1
        masked_adamw_(
            param.data.view(-1),
            param.grad.view(-1),  # type: ignore[union-attr]
            state["exp_avg"].view(-1),
            state["exp_avg_sq"].view(-1),
            self._protection(param),
            num_steps=int(state["step"]),
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            grad_scale=self.grad_scale,
        )


class MaskedUpdateWrapper(MaskedOptimizer):
    """Any element-wise optimizer (DeepSpeedCPUAdam, Lion, SGD ...), its step pulled back by I: p <- p + (p_old - p) I.

    The inner optimizer steps one chunk of a flat tensor after the other, each with its part of the state, so that the
    old values of one chunk are all the extra memory. The state is kept under the flat tensor, in the inner optimizer's
    own keys, as if it had stepped it whole.

    Args:
        inner: optimizer whose update of an element depends on that element's history alone.
        before_step: called before each flat tensor is stepped.
    """

    def __init__(self, inner: torch.optim.Optimizer, before_step: Callable[[], None] = lambda: None) -> None:
        super().__init__(inner.param_groups, inner.defaults)
        self._inner, self._before_step = inner, before_step
        self._old: torch.Tensor | None = None

    def _old_values(self, protection: Protection, part: torch.Tensor) -> torch.Tensor:
        """A copy of a chunk, in the same memory each time: fresh pages would cost more than the copy."""
        if self._old is None or self._old.numel() < part.numel():
            largest = max(map(len, protection.windows)) * CHUNK_WINDOWS
            self._old = torch.empty(largest, dtype=part.dtype, device=part.device)
        return self._old[: part.numel()].copy_(part)

    def _step_one(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        flat, grad, numel = param.data.view(-1), param.grad.view(-1), param.numel()  # type: ignore[union-attr]
        state, protection = self.state[param], self._protection(param)
        is_first, shared = not state, dict[str, Any]()
        self._before_step()
        for first in range(0, len(protection.windows), CHUNK_WINDOWS):
            windows = protection.windows[first : first + CHUNK_WINDOWS]
            chunk = slice(windows[0].start, windows[-1].stop)
            part = torch.nn.Parameter(flat[chunk], requires_grad=False)
            part.grad = grad[chunk]
            old = self._old_values(protection, part)
            part_state = {} if is_first else {key: _part(value, chunk, numel) for key, value in state.items()}
            self._inner.param_groups = [{**group, "params": [part]}]
            self._inner.state = {part: part_state}  # type: ignore[assignment]
            self._inner.step()
            soft_update_(part.data, old, protection, start=chunk.start)
            for key, value in part_state.items():
                if not _is_elementwise(value, part.numel()):
                    shared[key] = value
                elif is_first:
                    state.setdefault(key, value.new_empty(numel))[chunk] = value
        state.update(shared)


def _is_elementwise(value: Any, numel: int) -> bool:
    return torch.is_tensor(value) and value.dim() > 0 and value.numel() == numel


def _part(value: Any, chunk: slice, numel: int) -> Any:
    """The chunk's view of a moment; its own copy of what all chunks share, such as the step count."""
    if _is_elementwise(value, numel):
        return value.view(-1)[chunk]
    return value.clone() if torch.is_tensor(value) else value


def build_optimizer(parameters: dict[str, nn.Parameter], train: TrainConfig, *, on_host: bool) -> MaskedOptimizer:
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
        return MaskedUpdateWrapper(adam, lambda: _forget_powers(adam))
    return MaskedUpdateWrapper(_lion(groups, train, on_host=on_host))


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
