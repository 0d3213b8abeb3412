"""The soft update, in torch and in Triton, against the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from das_ds.functional.adamw import soft_update_ as reference_
from das_ds.kernels import cpu_tiles
from das_ds.kernels.protection import Protection
from das_ds.kernels.soft_update import soft_update_, soft_update_native_, soft_update_torch_
from helpers.protections import KINDS, inside_poison, is_poison_untouched, new_seed, random_protection

pytestmark = pytest.mark.usefixtures("small_tiles")

NUMEL = 2003


def in_torch(param: torch.Tensor, old: torch.Tensor, protection: Protection, start: int) -> None:
    soft_update_torch_(param, old, protection, start, protection.cpu_tiles_in(start, start + param.numel()))


def in_triton(*args: Any) -> None:
    from das_ds.kernels.soft_update_triton import soft_update_triton_

    soft_update_triton_(*args)


FORMS = {"torch": in_torch, "native": soft_update_native_, "triton": in_triton}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_soft_update_equals_float64(form: str, kind: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_tiles, "CPU_TILE_ELEMENTS", 300)
    seed = new_seed()
    generator = torch.Generator().manual_seed(seed)
    protection = random_protection(kind, NUMEL, generator, device)
    importance = protection.to_dense().double().cpu()
    starts = [tile.start for tile in protection.cpu_tiles]
    for start, stop in ((0, NUMEL), (0, starts[1]), (starts[2], starts[4]), (starts[-1], NUMEL)):
        new, old = (torch.randn(stop - start, generator=generator) for _ in range(2))
        full, param = inside_poison(new.to(device))
        FORMS[form](param, old.to(device), protection, start)
        expected = new.double()
        part = importance[start:stop]
        reference_(expected, old.double(), part)
        message = f"{kind}, [{start}, {stop}), seed {seed}"
        torch.testing.assert_close(param.double().cpu(), expected, rtol=1e-5, atol=1e-6, msg=message)
        assert torch.equal(param.cpu()[part == 1], old[part == 1]), message
        assert torch.equal(param.cpu()[part == 0], new[part == 0]), message
        assert is_poison_untouched(full, param), message


def test_soft_update_wrong_tensors_and_chunks_raise() -> None:
    protection = Protection(10)
    with pytest.raises(ValueError, match=r"old: found shape \(9,\), expected \(10,\)"):
        soft_update_(torch.zeros(10), torch.zeros(9), protection)
    with pytest.raises(ValueError, match=r"param: found torch\.float16, allowed: torch\.float32"):
        soft_update_(torch.zeros(10).half(), torch.zeros(10).half(), protection)
    with pytest.raises(ValueError, match=r"found \[0, 9\) of 10 elements"):
        soft_update_(torch.zeros(9), torch.zeros(9), protection)
