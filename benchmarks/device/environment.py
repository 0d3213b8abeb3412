"""Write the environment of a device run to `environment_<device type>.json`."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.result_io import default_device, write_result

OPTIONAL = ("triton", "peft", "liger-kernel", "datasets", "tokenizers", "safetensors", "accelerate", "pydantic")


def versions() -> list[dict[str, str]]:
    """Versions of optional packages, in addition to those in every result file."""
    rows = []
    for package in OPTIONAL:
        try:
            rows.append({"package": package, "version": version(package)})
        except PackageNotFoundError:
            rows.append({"package": package, "version": "not installed"})
    return rows


def main() -> None:
    """Write device, versions and date."""
    device = default_device()
    settings = {"cuda": torch.version.cuda, "num_gpus": torch.cuda.device_count()}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        settings |= {"capability": torch.cuda.get_device_capability(device), "free bytes": free, "bytes": total}
    print(f"written to {write_result('environment', device, settings, versions()).name}")


if __name__ == "__main__":
    main()
