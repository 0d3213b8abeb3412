"""Precision: the number formats that a device trains in, and the loss scale that keeps fp16 gradients in range."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from das_ds.engine.zero import freeze_loss_scale
from das_ds.errors import ConfigError


def check_precision(precision: str) -> None:
    """Check that DeepSpeed trains in this format on this device, before anything is built.

    Raises:
        ConfigError: the device does not compute in it.
    """
    accelerator = get_accelerator()
    supported = {"fp32": True, "bf16": accelerator.is_bf16_supported(), "fp16": accelerator.is_fp16_supported()}
    if not supported[precision]:
        allowed = ", ".join(name for name, is_supported in supported.items() if is_supported)
        raise ConfigError(
            f"train.precision: found {precision}, which this device ({accelerator.device_name()}) does not support; "
            f"allowed here: {allowed}"
        )


def emulated_precision_warning(precision: str) -> str:
    """Why this format is far slower than fp32 on this device; "" where it is not.

    Without oneDNN's kernels PyTorch multiplies 16-bit matrices on a CPU one value at a time.
    """
    if precision == "fp32" or get_accelerator().device_name() != "cpu":
        return ""
    is_fast = {
        "bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported,
        "fp16": torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }[precision]
    if torch.backends.mkldnn.is_available() and is_fast():
        return ""
    return f"this CPU has no instructions for {precision}, which is many times slower here than fp32"


class LossScaler:
    """DeepSpeed's loss scaler, updated after a step instead of within it.

    DeepSpeed updates the scale within a step, between measuring the gradients and dividing them: a step that raises it
    would divide by twice the scale that its loss was multiplied by.

    Args:
        engine: an engine of any precision; the scale is 1 where there is nothing to scale.
    """

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._optimizer: Any = engine.optimizer
        scaler = getattr(self._optimizer, "loss_scaler", None)
        self._scaler = scaler if isinstance(scaler, DynamicLossScaler) else None
        self.retry_helps = False
        """Whether the last step overflowed at a scale that was not the smallest."""
        if self._scaler is not None:
            self._scaler.raise_error_at_min_scale = False
            self._initial = dict(vars(self._scaler))
            freeze_loss_scale(self._optimizer)

    @property
    def value(self) -> float:
        """The factor of the next loss."""
        return float(getattr(self._optimizer, "loss_scale", 1.0))

    def update(self, *, overflowed: bool) -> None:
        """Lower the scale after an overflow, raise it after many steps without one; called after every step."""
        if self._scaler is not None:
            self.retry_helps = overflowed and self._scaler.cur_scale > self._scaler.min_scale
            self._scaler.update_scale(overflowed)

    def reset(self) -> None:
        """Back to the scale that the engine was built with."""
        if self._scaler is not None:
            vars(self._scaler).update(self._initial)

    def state(self) -> dict[str, Any]:
        """The scaler's counters and scale; {} where there is nothing to scale."""
        values = {} if self._scaler is None else vars(self._scaler)
        return {name: value for name, value in values.items() if isinstance(value, bool | int | float)}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        if self._scaler is not None:
            vars(self._scaler).update(state)
