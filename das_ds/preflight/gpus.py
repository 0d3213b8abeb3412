"""GPUs by their data sheets: peak FLOP/s of dense matrix products, memory, and bandwidth between GPUs of a node.

Data sheets often show FLOP/s with sparsity first, which are twice as large and not used here.
"""

from __future__ import annotations

from dataclasses import dataclass

from das_ds.errors import ConfigError

TERA = 1e12

PEAK_TFLOPS: dict[str, dict[str, float]] = {
    # NVIDIA H200 Tensor Core GPU data sheet (2024): 1979 TFLOP/s of bf16 with sparsity, 989 of TF32 with sparsity.
    "H200": {"bf16": 989.5, "fp16": 989.5, "tf32": 494.7, "fp32": 66.9},
    # NVIDIA H100 Tensor Core GPU Architecture white paper (2022), table 2: SXM5, then PCIe.
    "H100 PCIe": {"bf16": 756.0, "fp16": 756.0, "tf32": 378.0, "fp32": 51.2},
    "H100": {"bf16": 989.4, "fp16": 989.4, "tf32": 494.7, "fp32": 66.9},
    # NVIDIA Blackwell architecture data sheet (2024), HGX B200 per GPU.
    "B200": {"bf16": 2250.0, "fp16": 2250.0, "tf32": 1100.0},
    # NVIDIA A100 Tensor Core GPU Architecture white paper (2020), table 1.
    "A100": {"bf16": 312.0, "fp16": 312.0, "tf32": 156.0, "fp32": 19.5},
    # NVIDIA L40S data sheet (2023): 362 TFLOP/s of bf16, 183 of TF32, both dense.
    "L40S": {"bf16": 362.0, "fp16": 362.0, "tf32": 183.0, "fp32": 91.6},
    # NVIDIA A10 data sheet (2021).
    "A10": {"bf16": 125.0, "fp16": 125.0, "tf32": 62.5, "fp32": 31.2},
    # NVIDIA L4 data sheet (2023): 242 TFLOP/s of bf16 with sparsity.
    "L4": {"bf16": 121.0, "fp16": 121.0, "tf32": 60.0, "fp32": 30.3},
    # NVIDIA Tesla V100 white paper (2017), SXM2; it has no bf16 and no TF32.
    "V100": {"fp16": 125.0, "fp32": 15.7},
    # AMD Instinct MI300X data sheet (2023).
    "MI300X": {"bf16": 1307.4, "fp16": 1307.4, "tf32": 653.7, "fp32": 163.4},
}
"""Words of the device's name -> precision -> TFLOP/s; more specific names come first."""


def vendor_peak(name: str, precision: str) -> float | None:
    """FLOP/s according to the vendor; None if the device is not in the table, or lacks the format.

    Args:
        name: as torch gives it, such as `NVIDIA H100 80GB HBM3`.
        precision: `bf16`, `fp16`, `tf32` or `fp32`.
    """
    words = name.replace("-", " ").split()
    for key, peaks in PEAK_TFLOPS.items():
        if all(word in words for word in key.split()):
            return peaks[precision] * TERA if precision in peaks else None
    return None


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
