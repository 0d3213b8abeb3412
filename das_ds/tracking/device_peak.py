"""Peak FLOP/s of dense matrix products, by the data sheets of devices.

Data sheets often show FLOP/s with sparsity first, which are twice as large and not used here.
"""

from __future__ import annotations

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
