"""Precision of float32 matrix products; torch alone, so that masks without DeepSpeed can use it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tf32(device: torch.device) -> Iterator[None]:
    """Inside, float32 matrix products on this device may round their factors to TF32; nothing changes on a CPU.

    For products whose result is a small change of something else, and whose factors need no more than 10 bits.
    """
    saved = torch.get_float32_matmul_precision()
    if device.type != "cuda" or saved != "highest":
        yield
        return
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(saved)
