"""Optimizers stepped on fixed gradients, with a mask inside and with one from outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from das_ds.engine import mask as masks
from das_ds.engine.mask import ElementwiseMask
from das_ds.engine.optimizer import MaskedUpdateWrapper
from das_ds.kernels.cpu_tiles import CPU_TILE_ELEMENTS
from das_ds.kernels.protection import Protection

NUMEL = 2 * CPU_TILE_ELEMENTS + 1003
NUM_STEPS = 4
Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def run_steps(
    optimizer: torch.optim.Optimizer, param: torch.nn.Parameter, importance: torch.Tensor | None = None
) -> None:
    """Steps on fixed gradients; with `importance`, each step is pulled back from outside, on complete tensors."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(NUM_STEPS):
        param.grad = torch.randn(param.shape, generator=generator)
        old = param.detach().clone()
        optimizer.step()
        if importance is not None:
            param.data = old + (1 - importance.double()).float() * (param.data - old)


def check_pulled_back_in_chunks(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its steps under a mask, chunk by chunk, are those of complete tensors."""
    monkeypatch.setattr(masks, "CHUNK_TILES", 1)
    start = torch.randn(NUMEL)
    importance = torch.rand(NUMEL)
    importance[::7] = 0.0
    importance[1::7] = 1.0
    param = torch.nn.Parameter(start.clone())
    twin = torch.nn.Parameter(start.clone())
    found = MaskedUpdateWrapper(make([{"params": [param]}]))
    expected = make([{"params": [twin]}])
    largest = []
    inner = masks.soft_update_

    def watch(part: torch.Tensor, old: torch.Tensor, *args: Any, **options: Any) -> None:
        largest.append(old.numel())
        inner(part, old, *args, **options)

    monkeypatch.setattr(masks, "soft_update_", watch)
    found.set_masks({param: ElementwiseMask(Protection(NUMEL, importance=importance))})
    run_steps(found, param)
    run_steps(expected, twin, importance)
    torch.testing.assert_close(param.data, twin.data, rtol=1e-5, atol=1e-6)
    assert torch.equal(param.data[1::7], start[1::7])
    # Never a copy of all: one chunk at a time.
    assert max(largest) == CPU_TILE_ELEMENTS and len(largest) == 3 * NUM_STEPS
    # The state is that of an optimizer that stepped the complete tensor once per step.
    assert found.state[param].keys() == expected.state[twin].keys()
    for key, value in expected.state[twin].items():
        if torch.is_tensor(value) and value.dim():
            torch.testing.assert_close(found.state[param][key], value, rtol=1e-5, atol=1e-6)
        else:
            assert found.state[param][key] == value
