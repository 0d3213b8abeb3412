"""Masked AdamW, in torch and in Triton, against the formula in float64 and against torch's own optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from das_ds.functional.adamw import masked_adamw_ as reference_
from das_ds.kernels.adamw_step import AdamWStep
from das_ds.kernels.masked_adamw import masked_adamw_, masked_adamw_native_, masked_adamw_torch_
from das_ds.kernels.protection import Protection
from helpers.protections import KINDS, inside_poison, is_poison_untouched, new_seed, random_protection

pytestmark = pytest.mark.usefixtures("small_tiles")

SETTINGS: dict[str, Any] = {"lr": 3e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
SIZES = (1, 127, 128, 129, 1003)
Form = Callable[[AdamWStep, Protection], None]


def in_triton(step: AdamWStep, protection: Protection) -> None:
    # Imported late: the interpreter has to be chosen before.
    from das_ds.kernels.masked_adamw_triton import masked_adamw_triton_

    masked_adamw_triton_(step, protection)


FORMS: dict[str, Form] = {"torch": masked_adamw_torch_, "native": masked_adamw_native_, "triton": in_triton}


def step_in(form: str, *tensors: Any, num_steps: int, grad_scale: torch.Tensor | None = None) -> None:
    """One step of a form; the last of `tensors` is the protection."""
    *four, protection = tensors
    FORMS[form](AdamWStep(*four, num_steps=num_steps, grad_scale=grad_scale, **SETTINGS), protection)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scaled", [False, True])
def test_masked_adamw_equals_float64(form: str, kind: str, scaled: bool, device: str) -> None:
    for numel in SIZES:
        seed = new_seed()
        generator = torch.Generator().manual_seed(seed)
        protection = random_protection(kind, numel, generator, device)
        start = [torch.randn(numel, generator=generator) for _ in range(2)]
        start += [0.1 * torch.randn(numel, generator=generator), torch.rand(numel, generator=generator)]
        poisoned = [inside_poison(values.to(device)) for values in start]
        views = [view for _, view in poisoned]
        grad_scale = torch.tensor(2.5, device=device) if scaled else None
        step_in(form, *views, protection, num_steps=7, grad_scale=grad_scale)
        expected = [values.double() for values in start]
        importance = protection.to_dense().double().cpu()
        reference_(*expected, importance, num_steps=7, grad_scale=2.5 if scaled else 1.0, **SETTINGS)
        message = f"{kind}, {numel} elements, seed {seed}"
        for index in (0, 2, 3):
            torch.testing.assert_close(views[index].double().cpu(), expected[index], rtol=1e-5, atol=1e-6, msg=message)
        assert all(is_poison_untouched(full, view) for full, view in poisoned), message
        assert torch.equal(views[0].cpu()[importance == 1], start[0][importance == 1]), message


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["none", "all 0"])
def test_masked_adamw_unprotected_equals_torch(form: str, kind: str, device: str) -> None:
    numel = 1003
    seed = new_seed()
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(numel, generator=generator)
    twin = torch.nn.Parameter(start.clone())
    other = torch.optim.AdamW([twin], **SETTINGS)
    protection = random_protection(kind, numel, generator, device)
    param = start.clone().to(device)
    moments = [torch.zeros(numel, device=device) for _ in range(2)]
    for step in range(100):
        twin.grad = torch.randn(numel, generator=generator)
        other.step()
        grad = twin.grad.to(device)
        step_in(form, param, grad, *moments, protection, num_steps=step + 1)
    torch.testing.assert_close(param.cpu(), twin.data, rtol=1e-5, atol=1e-5, msg=f"seed {seed}")
    for found, key in zip(moments, ("exp_avg", "exp_avg_sq"), strict=True):
        torch.testing.assert_close(found.cpu(), other.state[twin][key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["units", "uint8"])
def test_masked_adamw_importance_changes_in_place(form: str, kind: str, device: str) -> None:
    generator = torch.Generator().manual_seed(new_seed())
    protection = random_protection(kind, 1003, generator, device)
    values = protection.importance if protection.table is None else protection.table.values
    assert values is not None
    for full, moves in ((255 if kind == "uint8" else 1, False), (0, True)):
        values.fill_(full)
        param, grad = (torch.ones(1003, device=device) for _ in range(2))
        moments = [torch.zeros(1003, device=device) for _ in range(2)]
        step_in(form, param, grad, *moments, protection, num_steps=1)
        protected = protection.to_dense().to(device) == 1
        assert not (param[protected] != 1).any() and bool((param[~protected] != 1).all())
        assert bool((~protected).all()) == moves


@pytest.mark.parametrize("form", FORMS)
def test_masked_adamw_empty_shard(form: str, device: str) -> None:
    nothing = [torch.zeros(0, device=device) for _ in range(4)]
    step_in(form, *nothing, Protection(0), num_steps=1)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("param", torch.zeros(9), r"param: found shape \(9,\), expected \(10,\)"),
        ("grad", torch.zeros(10, dtype=torch.bfloat16), r"grad: found torch.bfloat16, allowed: torch.float32"),
        ("exp_avg", torch.zeros(20)[::2], r"exp_avg: found strides \(2,\), expected a contiguous tensor"),
        ("exp_avg_sq", torch.zeros(10, device="meta"), "exp_avg_sq: found on meta, expected on cpu like the others"),
    ],
)
def test_masked_adamw_wrong_tensors_raise(name: str, wrong: torch.Tensor, message: str) -> None:
    tensors = {key: torch.zeros(10) for key in ("param", "grad", "exp_avg", "exp_avg_sq")} | {name: wrong}
    with pytest.raises(ValueError, match=message):
        masked_adamw_(*tensors.values(), Protection(10), num_steps=1, **SETTINGS)
