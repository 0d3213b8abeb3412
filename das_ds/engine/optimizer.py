"""Optimizers that DeepSpeed steps on its flat fp32 tensors, with updates that are soft-masked.

Shape legend: F elements of a flat tensor, n elements of a chunk of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from das_ds.config import ImportanceScore, TrainConfig
from das_ds.distributed.state import Flats
from das_ds.engine.mask import CHUNK_TILES, DecayMasks, ElementwiseMask, UpdateMask, UpdateMasks
from das_ds.engine.step_masks import StepMasks
from das_ds.engine.zero import full_shape
from das_ds.errors import ConfigError
from das_ds.functional.importance import importance_score
from das_ds.kernels.cpu_tiles import CPU_TILE_ELEMENTS
from das_ds.kernels.masked_adamw import masked_adamw_
from das_ds.kernels.protection import Protection

MAX_BUFFER_ELEMENTS = CHUNK_TILES * CPU_TILE_ELEMENTS
"""Old values that stay allocated between steps; a copy of a larger chunk is freed after its step."""


class MaskedOptimizer(torch.optim.Optimizer, ABC):
    """What both optimizers share: the masks of each flat tensor, and measuring gradients in place of stepping."""

    moment_keys: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    """State by weight that any optimizer here may have."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self._masks = StepMasks()
        self._masks_decay = True
        self._sums: Flats | None = None
        self._kind: ImportanceScore = "abs_grad"
        self._skips_update = False
        self._old: torch.Tensor | None = None
        self.grad_scale: torch.Tensor | None = None

    def set_masks(self, masks: UpdateMasks, *, masks_decay: bool = True) -> None:
        """Mask the updates of these flat tensors from now on, and of no others.

        Args:
            masks: flat tensor -> its mask.
            masks_decay: whether the decoupled weight decay is masked with the rest of the update.
        """
        self._masks.set_updates(masks)
        self._masks_decay = masks_decay
        self._old = None

    def set_decay_masks(self, masks: DecayMasks) -> None:
        """Mask the weight decay of these flat tensors from now on, and of no others."""
        self._masks.set_decay(masks)

    def set_frozen(self, frozen: Mapping[torch.Tensor, Sequence[slice]]) -> None:
        """Leave these spans of flat tensors at their present values from now on, and no others, whatever steps them."""
        self._masks.set_frozen(frozen)

    @contextmanager
    def accumulate_importance(self, sums: Flats, kind: ImportanceScore) -> Iterator[None]:
        """Inside, a step adds the gradient's `importance_score` to the tensor's sum (F,); weights and moments stay."""
        self._sums = sums
        self._kind = kind
        try:
            yield
        finally:
            self._sums = None

    @contextmanager
    def skip_update(self) -> Iterator[None]:
        """Inside, a step changes nothing: DeepSpeed drops the gradients as after any other."""
        self._skips_update = True
        try:
            yield
        finally:
            self._skips_update = False

    def set_grad_scale(self, grad_scale: torch.Tensor | None) -> None:
        """Divisor of the next step's gradients, a scalar on their device; None: 1."""
        self.grad_scale = grad_scale

    def reset_state(self) -> None:
        """Reset moments and step counts, as at the start of a new domain."""
        for state in self.state.values():
            for key, value in state.items():
                state[key] = value.zero_() if torch.is_tensor(value) else 0

    def moments(self) -> tuple[dict[str, Flats], dict[str, Any]]:
        """(key -> flat tensor -> (F,) moment as a view, key -> scalar that all flat tensors share)."""
        by_key: dict[str, Flats] = {}
        scalars: dict[str, Any] = {}
        for param, state in self.state.items():
            for key, value in state.items():
                if _is_elementwise(value, param.numel()):
                    by_key.setdefault(key, {})[param] = value.view(-1)
                else:
                    # A resumed run counts anew in flat tensors with only padding, of which nothing was saved.
                    scalars[key] = max(value.item() if torch.is_tensor(value) else value, scalars.get(key, 0))
        return by_key, scalars

    def load_moments(self, by_key: dict[str, Flats], scalars: dict[str, Any]) -> None:
        """Continue with these moments, (F,) each; scalars become what this optimizer keeps (a host scalar or int)."""
        for key, flats in by_key.items():
            for param, values in flats.items():
                self.state[param][key] = values.view_as(param)
        for param, state in self.state.items():
            if param in next(iter(by_key.values()), {}):
                state.update({key: self._as_state_value(value) for key, value in scalars.items()})

    def _as_state_value(self, value: float) -> Any:
        return int(value)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step on every parameter that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        if self._skips_update:
            return loss
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                if self._sums is not None:
                    # A flat tensor in which this rank has only padding has no sum.
                    if param in self._sums:
                        self._add_score(param, self._sums[param])
                    continue
                self._masks.compensate_decay_(param, group)
                mask = self._masks.update_mask(param)
                settings = group if mask is None or self._masks_decay else self._decay_in_full(param, group)
                self._step_flat(param, settings, mask)
                if mask is not None:
                    mask.finish_(param.data.view(-1))
                self._masks.restore_frozen_(param)
        return loss

    def _decay_in_full(self, param: torch.Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """Decay before the step, outside its mask, as decoupled decay comes first; the settings of a step without."""
        decay = group["lr"] * group.get("weight_decay", 0.0)
        if decay == 0.0:
            return group
        param.data.mul_(1.0 - decay)
        return {**group, "weight_decay": 0.0}

    def _add_score(self, param: torch.Tensor, total: torch.Tensor) -> None:
        gradient = param.grad.view(-1)  # type: ignore[union-attr]
        # Before it is squared: the square of a scaled gradient would have to be divided twice.
        if self.grad_scale is not None:
            gradient = gradient / self.grad_scale
        total.add_(importance_score(gradient, param.data.view(-1), self._kind))

    @abstractmethod
    def _step_flat(self, param: torch.Tensor, group: dict[str, Any], mask: UpdateMask | None) -> None:
        """Step a flat tensor under its mask."""

    @contextmanager
    def _masking(self, mask: UpdateMask | None, flat: torch.Tensor, chunk: slice) -> Iterator[torch.Tensor]:
        """Inside, the given chunk of a flat tensor (n,) is stepped; afterwards its update is masked."""
        values = flat[chunk]
        if mask is None:
            yield values
            return
        old = self._copy_old(values)
        yield values
        mask.blend_(values, old, chunk)

    def _copy_old(self, values: torch.Tensor) -> torch.Tensor:
        """The values before a step, in the same memory for all chunks: fresh pages would cost more than the copy."""
        if values.numel() > MAX_BUFFER_ELEMENTS:
            return values.clone()
        if self._old is None or self._old.numel() < values.numel() or self._old.device != values.device:
            self._old = torch.empty_like(values)
        return self._old[: values.numel()].copy_(values)


class MaskedAdamW(MaskedOptimizer):
    """AdamW with decoupled weight decay; an element-wise mask and the step are one pass (`kernels.masked_adamw`).

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
        self._unprotected: dict[int, Protection] = {}

    def _as_state_value(self, value: float) -> Any:
        # On the host, as in torch's own AdamW: reading it makes no step wait for the device.
        return torch.tensor(float(value), dtype=torch.float32)

    def _step_flat(self, param: torch.Tensor, group: dict[str, Any], mask: UpdateMask | None) -> None:
        state = self.state[param]
        if "step" not in state:
            state["step"] = self._as_state_value(0)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        state["step"] += 1
        flat = param.data.view(-1)
        if isinstance(mask, ElementwiseMask):
            self._step_fused(param, group, slice(0, len(flat)), mask.protection)
            return
        for chunk in [slice(0, len(flat))] if mask is None else mask.chunks():
            with self._masking(mask, flat, chunk) as values:
                self._step_fused(param, group, chunk, self._no_protection(len(values)))

    def _step_fused(self, param: torch.Tensor, group: dict[str, Any], chunk: slice, protection: Protection) -> None:
        state = self.state[param]
        masked_adamw_(
            param.data.view(-1)[chunk],
            param.grad.view(-1)[chunk],  # type: ignore[union-attr]
            state["exp_avg"].view(-1)[chunk],
            state["exp_avg_sq"].view(-1)[chunk],
            protection,
            num_steps=int(state["step"]),
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            grad_scale=self.grad_scale,
        )

    def _no_protection(self, numel: int) -> Protection:
        # Kept, since it caches the tables of tiles that kernels need.
        if numel not in self._unprotected:
            self._unprotected[numel] = Protection(numel)
        return self._unprotected[numel]


class MaskedUpdateWrapper(MaskedOptimizer):
    """Any element-wise optimizer (DeepSpeedCPUAdam, Lion, SGD ...) whose update is masked after it stepped.

    The inner optimizer steps one chunk of a flat tensor after the other, each with its slice of the state, so that the
    old values of one chunk are all the extra memory. The state is kept under the flat tensor, in the inner optimizer's
    own keys, as if it had stepped all of it at once.

    Args:
        inner: optimizer whose update of an element depends only on that element's history.
        before_step: called before each flat tensor is stepped.
    """

    def __init__(self, inner: torch.optim.Optimizer, before_step: Callable[[], None] = lambda: None) -> None:
        super().__init__(inner.param_groups, inner.defaults)
        self._inner = inner
        self._before_step = before_step

    def _step_flat(self, param: torch.Tensor, group: dict[str, Any], mask: UpdateMask | None) -> None:
        flat = param.data.view(-1)
        state = self.state[param]
        # The first step adds to `state` chunk by chunk, and the inner optimizer starts every chunk with none.
        earlier_state = dict(state)
        shared: dict[str, Any] = {}
        self._before_step()
        for chunk in [slice(0, len(flat))] if mask is None else mask.chunks():
            chunk_state = {key: _crop_state(value, chunk, len(flat)) for key, value in earlier_state.items()}
            with self._masking(mask, flat, chunk) as values:
                self._step_inner(values, param.grad.view(-1)[chunk], group, chunk_state)  # type: ignore[union-attr]
            for key, value in chunk_state.items():
                if not _is_elementwise(value, len(values)):
                    shared[key] = value
                elif not earlier_state and len(values) == len(flat):
                    state[key] = value
                elif not earlier_state:
                    state.setdefault(key, value.new_empty(len(flat)))[chunk] = value
        # Step counts advance once per step, not once per chunk.
        state.update(shared)

    def _step_inner(
        self, values: torch.Tensor, grad: torch.Tensor, group: dict[str, Any], state: dict[str, Any]
    ) -> None:
        """Step (n,) values in place, with the state of these elements, which is updated."""
        chunk_param = nn.Parameter(values, requires_grad=False)
        chunk_param.grad = grad
        self._inner.param_groups = [{**group, "params": [chunk_param]}]
        self._inner.state = {chunk_param: state}  # type: ignore[assignment]
        self._inner.step()


def _is_elementwise(value: Any, numel: int) -> bool:
    return torch.is_tensor(value) and value.dim() > 0 and value.numel() == numel


def _crop_state(value: Any, chunk: slice, numel: int) -> Any:
    """The chunk's view of a moment; a copy of values that all chunks share, such as the step count."""
    if _is_elementwise(value, numel):
        return value.view(-1)[chunk]
    return value.clone() if torch.is_tensor(value) else value


def build_optimizer(
    parameters: dict[str, nn.Parameter],
    train: TrainConfig,
    *,
    on_host: bool,
    depths: Mapping[str, int] | None = None,
) -> MaskedOptimizer:
    """The optimizer that `train.optimizer` names, with learning rate 0: the scheduler of a domain sets it.

    Stage 0 in bf16 takes a step with zero gradients while the engine is built; without a learning rate it moves
    nothing.

    Args:
        parameters: name -> parameter.
        train: optimization settings.
        on_host: whether the fp32 shards are in host memory.
        depths: name -> depth of every parameter of the network, trained or not; only `train.layer_lr_decay` needs it.

    Raises:
        ConfigError: an optimizer that cannot step them.
    """
    groups = _parameter_groups(parameters, train, depths or {})
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
        return MaskedUpdateWrapper(adam, lambda: _recompute_beta_powers(adam))
    return MaskedUpdateWrapper(_lion(groups, train, on_host=on_host))


def _recompute_beta_powers(adam: Any) -> None:
    """Make DeepSpeedCPUAdam recompute the powers of its betas, by a step on one number with other betas.

    It multiplies the powers of the step before, which a resumed run does not have and would round differently.
    """
    scalars = [torch.zeros(1) for _ in range(4)]
    adam.ds_opt_adam.adam_update(adam.opt_id, 1, 0.0, 0.0, 0.0, 1.0, 0.0, False, *scalars)


def _lion(groups: list[dict[str, Any]], train: TrainConfig, *, on_host: bool) -> torch.optim.Optimizer:
    from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion

    lion = DeepSpeedCPULion if on_host else FusedLion
    return lion(groups, lr=0.0, betas=train.betas, weight_decay=0.0)


def _parameter_groups(
    parameters: dict[str, nn.Parameter], train: TrainConfig, depths: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Matrices, which decay, and vectors (biases, normalization), which do not; each by depth where rates differ.

    Layer-wise learning-rate decay, discriminative fine-tuning in Howard & Ruder, *Universal Language Model Fine-tuning
    for Text Classification* (ACL 2018, section 3.2, which divides the rate by 2.6 from layer to layer):

        rate of depth d = rate * layer_lr_decay^(D - d)          D: largest depth, that of the LM head; 0: embeddings

    The first group has the highest rate. `lr_scale` is a group's factor of the scheduled rate.
    """
    if train.layer_lr_decay == 1.0:
        depths = {}
    else:
        assert depths, "rates by layer need depths"
    top = max(depths.values(), default=0)
    groups = []
    for weight_decay, is_matrix in ((train.weight_decay, True), (0.0, False)):
        for depth in range(top, -1, -1):
            members = [
                parameter
                for name, parameter in parameters.items()
                if (len(full_shape(parameter)) > 1) is is_matrix and depths.get(name, 0) == depth
            ]
            scale = train.layer_lr_decay ** (top - depth)
            groups.append({"params": members, "weight_decay": weight_decay, "lr_scale": scale})
    return [group for group in groups if group["params"]]
