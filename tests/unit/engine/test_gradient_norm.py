"""The norm of many gradients together, compared with one in float64."""

from __future__ import annotations

import math

import pytest
import torch

from das_ds.engine.gradient_norm import ROW_ELEMENTS, total_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_total_norm_any_sizes_equals_float64(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [
        (),
        (1,),
        (ROW_ELEMENTS - 1,),
        (ROW_ELEMENTS,),
        (7, ROW_ELEMENTS),
        (33, 129),
        (0,),
        (3 * ROW_ELEMENTS + 1,),
    ]
    gradients = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    expected = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))
    assert total_norm([*gradients, None]).item() == pytest.approx(expected, rel=1e-6)


def test_total_norm_many_equal_values_does_not_drift() -> None:
    gradient = torch.full((2**24 + 3,), 1e-3)
    expected = gradient[0].double().item() * math.sqrt(gradient.numel())
    assert total_norm([gradient]).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("found", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 2 * ROW_ELEMENTS + 1])
def test_total_norm_not_finite_value_is_not_finite(found: float, place: int) -> None:
    gradient = torch.ones(2 * ROW_ELEMENTS + 2)
    gradient[place] = found
    assert not total_norm([torch.ones(5), gradient]).isfinite()


def test_total_norm_of_nothing_is_zero() -> None:
    assert total_norm([None]).item() == 0.0
