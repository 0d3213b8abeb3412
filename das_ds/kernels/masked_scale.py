"""Masked scaling of gradients (the published form of the soft mask), many tensors at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from das_ds.kernels.dispatch import FLOATS, check_flat, use_triton
from das_ds.kernels.protection import Protection


class MaskedScale:
    """g <- g * (1 - I) for a fixed list of protections and, at every call, other tensors of the same sizes.

    Args:
        protections: one per tensor, all by units over one vector of values, or all by parameter with one type.
    """

    def __init__(self, protections: Sequence[Protection]) -> None:
        self.protections = tuple(protections)
        self._on_device: Callable[[Sequence[torch.Tensor]], None] | None = None
        if tables := [p.table for p in protections if p.table is not None]:
            assert len(tables) == len(protections), "importance is by units or by parameter"
            assert all(table.values is tables[0].values for table in tables), "units share one vector of values"

    def __call__(self, tensors: Sequence[torch.Tensor]) -> None:
        """Scale the tensors in place, in one launch on a GPU; the product is rounded once.

        Args:
            tensors: one per protection, (n,) float32, bfloat16 or float16, all of one type.

        Raises:
            ValueError: tensors of another number, shape, type, device or layout.
        """
        if len(tensors) != len(self.protections):
            raise ValueError(f"tensors: found {len(tensors)}, expected {len(self.protections)}, one per protection")
        for number, (tensor, protection) in enumerate(zip(tensors, self.protections, strict=True)):
            check_flat({f"tensor {number}": tensor}, protection.numel, FLOATS)
            if tensor.dtype != tensors[0].dtype or tensor.device != tensors[0].device:
                raise ValueError(
                    f"tensor {number}: found {tensor.dtype} on {tensor.device}, expected {tensors[0].dtype} on "
                    f"{tensors[0].device} like the first"
                )
        if not tensors:
            return
        if use_triton("masked_scale", tensors[0]):
            self._launch(tensors[0].device)(tensors)
        else:
            masked_scale_torch_(tensors, self.protections)

    def _launch(self, device: torch.device) -> Callable[[Sequence[torch.Tensor]], None]:
        if self._on_device is None:
            from das_ds.kernels.masked_scale_triton import ScaleLaunch

            self._on_device = ScaleLaunch(self.protections, device)
        return self._on_device


def masked_scale_torch_(tensors: Sequence[torch.Tensor], protections: Sequence[Protection]) -> None:
    """Masked scaling in torch, tile by tile."""
    for tensor, protection in zip(tensors, protections, strict=True):
        scratch = protection.scratch()
        for tile in protection.cpu_tiles:
            protection.scale_grad_(tensor[tile.start : tile.stop], tile, scratch)
