"""GPUs by their data sheets: memory, and bandwidth between GPUs of a node; for peaks see `tracking/device_peak.py`."""

from __future__ import annotations

from dataclasses import dataclass

from das_ds.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """A GPU as the planner sees it."""

    name: str
    memory_gib: float
    """GiB, as it is sold."""
    link: float
    """GB/s that it sends to others of its node while it receives as much."""


GPUS: dict[str, Gpu] = {
    # NVLink: half of the bandwidth of both directions together. Without it: PCIe 4 or 5 with 16 lanes.
    "h200": Gpu("H200", 141, 450),
    "h100": Gpu("H100", 80, 450),
    "h100-pcie": Gpu("H100 PCIe", 80, 64),
    "b200": Gpu("B200", 180, 900),
    "a100": Gpu("A100", 80, 300),
    "a100-40gb": Gpu("A100", 40, 300),
    "l40s": Gpu("L40S", 48, 32),
    "a10": Gpu("A10", 24, 32),
    "l4": Gpu("L4", 24, 32),
    "v100": Gpu("V100", 32, 150),
    "mi300x": Gpu("MI300X", 192, 448),
}
"""Value of `--gpu` -> its data sheet."""


def find_gpu(name: str) -> Gpu:
    """A GPU of the table.

    Raises:
        ConfigError: it is not there.
    """
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise ConfigError(f"--gpu: found {name}, allowed: {', '.join(GPUS)}; or give --gpu-tflops and --gpu-memory")
    return gpu
