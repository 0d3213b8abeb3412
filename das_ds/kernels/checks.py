"""Arguments that kernels refuse: they would read memory that is not there or in another layout."""

from __future__ import annotations

from collections.abc import Mapping

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_flat(
    tensors: Mapping[str, torch.Tensor], numel: int, dtypes: tuple[torch.dtype, ...] = (torch.float32,)
) -> None:
    """Tensors of one kernel call: contiguous, one-dimensional, of `numel` elements, of one device and allowed type.

    Raises:
        ValueError: what was found, expected and allowed.
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
