"""Kernel dispatch: Triton or Liger on a GPU where they are installed, torch everywhere else; and checks of arguments.

A kernel given a tensor of another size or layout would read memory out of bounds.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from packaging.version import Version

logger = logging.getLogger(__name__)

LIGER_FLOOR = Version("0.8.2")
"""0.8.1 and older multiply all gradients of per-token losses by the first token's upstream gradient, silently."""
LIGER_TYPES = (torch.float32, torch.bfloat16)
"""Not float16: Liger rounds the softmax before the loss scale reaches it, and small probabilities become zero."""


def use_triton(kernel: str, tensor: torch.Tensor) -> bool:
    """Whether `kernel` runs as Triton on this tensor's device; the choice is logged once per kernel and device."""
    return _choice(kernel, tensor.device.type)


@cache
def _choice(kernel: str, device_type: str) -> bool:
    is_installed = find_spec("triton") is not None
    is_chosen = device_type == "cuda" and is_installed
    if is_chosen:
        form = "Triton"
    elif device_type == "cuda":
        form = "torch, because Triton is not installed"
    else:
        form = "torch"
    logger.info("%s on %s: %s", kernel, device_type, form)
    return is_chosen


def use_liger(kernel: str, tensor: torch.Tensor) -> bool:
    """Whether Liger's form of `kernel` runs on tensors like this one; logged once per kernel, device and type."""
    return _liger_choice(kernel, tensor.device.type, tensor.dtype)


@cache
def _liger_choice(kernel: str, device_type: str, dtype: torch.dtype) -> bool:
    obstacle = "" if device_type == "cuda" else "no GPU"
    if not obstacle and dtype not in LIGER_TYPES:
        obstacle = f"Liger's kernel loses small gradients in {dtype}"
    if not obstacle:
        try:
            found = Version(version("liger-kernel"))
            obstacle = "" if found >= LIGER_FLOOR else f"liger-kernel is {found}, older than {LIGER_FLOOR}"
        except PackageNotFoundError:
            obstacle = "liger-kernel is not installed"
    logger.info("%s on %s: %s", kernel, device_type, f"torch, because of this: {obstacle}" if obstacle else "Liger")
    return not obstacle


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_flat(
    tensors: Mapping[str, torch.Tensor], numel: int, dtypes: tuple[torch.dtype, ...] = (torch.float32,)
) -> None:
    """Tensors of one kernel call: contiguous, one-dimensional, of `numel` elements, of one device and allowed type.

    Raises:
        ValueError: a tensor has another shape, type or device, or is not contiguous.
    """
    device = next(iter(tensors.values())).device
    for name, tensor in tensors.items():
        if tensor.shape != (numel,):
            raise ValueError(f"{name}: found shape {tuple(tensor.shape)}, expected ({numel},)")
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name}: found {tensor.dtype}, allowed: {', '.join(map(str, dtypes))}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: found strides {tensor.stride()}, expected a contiguous tensor")
        if tensor.device != device:
            raise ValueError(f"{name}: found on {tensor.device}, expected on {device} like the others")
