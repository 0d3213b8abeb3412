"""Peak FLOP/s of devices: from the vendors' data sheets (`das_ds/tracking/device_peak.py`), or measured here."""

from __future__ import annotations

import time

import torch

from benchmarks.timing import now
from das_ds.tracking.device_peak import PEAK_TFLOPS, TERA, vendor_peak

__all__ = ["PEAK_TFLOPS", "TERA", "measured_peak", "vendor_peak"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SECONDS = 1.0
"""How long `measured_peak` measures."""


def measured_peak(device: torch.device, precision: str, size: int) -> float:
    """FLOP/s of the fastest square matrix product measured here, for devices that are not in the table.

    Args:
        device: to measure.
        precision: `bf16`, `fp16` or `fp32`.
        size: rows and columns of the factors.
    """
    factors = [torch.randn(size, size, device=device, dtype=DTYPES[precision]) for _ in range(2)]
    fastest = float("inf")
    deadline = time.perf_counter() + SECONDS
    while True:
        start = now(device)
        torch.mm(*factors)
        fastest = min(fastest, now(device) - start)
        if time.perf_counter() > deadline:
            return 2 * size**3 / fastest
