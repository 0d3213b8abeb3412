"""Liger's fused loss against all logits at once in float64, and when it is chosen.

Without a GPU it runs in Triton's interpreter, which cannot run its soft cap.
"""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from torch.nn import functional

from das_ds.kernels import dispatch
from das_ds.kernels.linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy_liger

P = 13
H = 8
V = 37
CHUNK = 5


def case(device: str, dtype: torch.dtype, *, bias: bool) -> tuple[list[torch.Tensor | None], torch.Tensor]:
    """Hidden states, weight and bias, and targets."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(P, H), (V, H), (V,)]
    inputs: list[torch.Tensor | None] = [
        torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes
    ]
    inputs[2] = inputs[2] if bias else None
    return inputs, torch.randint(0, V, (P,), generator=generator).to(device)


def check(device: str, dtype: torch.dtype, *, bias: bool, soft_cap: float | None, allowed: float) -> None:
    """Both forms against float64, with an upstream gradient that differs between positions."""
    inputs, targets = case(device, dtype, bias=bias)
    upstream = torch.linspace(-1.0, 2.0, P, device=device)
    doubles = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    logits = functional.linear(*doubles)  # type: ignore[arg-type]
    logits = logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)
    losses = functional.cross_entropy(logits, targets, reduction="none")
    given = [x for x in inputs if x is not None]
    expected = torch.autograd.grad(losses, [x for x in doubles if x is not None], upstream.double())
    for found in (
        linear_cross_entropy_liger(*inputs, targets, soft_cap),  # type: ignore[arg-type]
        LinearCrossEntropy.apply(*inputs, targets, CHUNK, soft_cap),
    ):
        assert found.dtype == torch.float32
        gradients = torch.autograd.grad(found, given, upstream)
        assert all(gradient.dtype == dtype for gradient in gradients)
        for value, reference in zip((found, *gradients), (losses, *expected), strict=True):
            assert (value.double() - reference).norm() <= allowed * reference.norm()


@pytest.mark.parametrize("bias", [False, True])
def test_linear_cross_entropy_forms_equal_float64(bias: bool, device: str) -> None:
    check(device, torch.float32, bias=bias, soft_cap=None, allowed=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_linear_cross_entropy_forms_on_gpu(dtype: torch.dtype, allowed: float, soft_cap: float | None) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    check("cuda", dtype, bias=True, soft_cap=soft_cap, allowed=allowed)


@pytest.mark.parametrize(
    ("device_type", "dtype", "installed", "reason"),
    [
        ("cuda", torch.bfloat16, "0.8.2", "Liger"),
        ("cuda", torch.float32, "0.10.0", "Liger"),
        ("cuda", torch.float16, "0.8.5", "loses small gradients in torch.float16"),
        ("cuda", torch.bfloat16, "0.8.1", "liger-kernel is 0.8.1, older than 0.8.2"),
        ("cuda", torch.bfloat16, None, "liger-kernel is not installed"),
        ("cpu", torch.bfloat16, "0.8.5", "no GPU"),
    ],
)
def test_use_liger_logs_choice_once(
    device_type: str,
    dtype: torch.dtype,
    installed: str | None,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def version(_: str) -> str:
        if installed is None:
            raise PackageNotFoundError
        return installed

    monkeypatch.setattr(dispatch, "version", version)
    dispatch._liger_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        chosen = {dispatch._liger_choice("loss", device_type, dtype) for _ in range(2)}
    dispatch._liger_choice.cache_clear()
    assert chosen == {reason == "Liger"}
    assert len(caplog.records) == 1 and reason in caplog.text
