"""Which form of a kernel runs: Triton on a GPU where it is installed, torch everywhere else."""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec

import torch

logger = logging.getLogger(__name__)


def use_triton(kernel: str, tensor: torch.Tensor) -> bool:
    """Whether `kernel` runs as Triton on this tensor's device; the choice is logged once per kernel and device."""
    return _choice(kernel, tensor.device.type)


@cache
def _choice(kernel: str, device_type: str) -> bool:
    is_installed = find_spec("triton") is not None
    chosen = device_type == "cuda" and is_installed
    reason = "Triton" if chosen else "torch, because Triton is not installed" if device_type == "cuda" else "torch"
    logger.info("%s on %s: %s", kernel, device_type, reason)
    return chosen
