"""The regression mean of layers against least squares on what they read, and where that has no single solution."""

from __future__ import annotations

import pytest
import torch

from das_ds.functional.regression_mean import merging_map

WIDTH = 7
NUM_OUTPUTS = 5


def vectors(num: int, seed: int, width: int = WIDTH) -> torch.Tensor:
    """(n, d) inputs whose elements are of different sizes and correlated."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(num, width, generator=generator, dtype=torch.float64) @ mix * torch.logspace(-1, 1, width)


def moment(x: torch.Tensor) -> torch.Tensor:
    """As it is measured: in float32."""
    return (x.T @ x / len(x)).float()


def matrix(seed: int, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(NUM_OUTPUTS, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def merge(old: torch.Tensor, new: torch.Tensor, *moments: torch.Tensor, off_diagonal: float = 1.0) -> torch.Tensor:
    mapped = merging_map(moments[0], moments[1], off_diagonal)
    assert mapped.width == len(moments[0]) and mapped.matrix.is_contiguous()
    return new + mapped.project(old - new)


def test_merge_of_layers_is_least_squares_on_their_outputs() -> None:
    """One domain after another, over three: min_W sum_k E|W x - W_k x|^2."""
    inputs = [vectors(40, seed) for seed in range(3)]
    layers = [matrix(10 + seed) for seed in range(3)]
    merged, total = layers[0], moment(inputs[0])
    for x, layer in zip(inputs[1:], layers[1:], strict=True):
        merged = merge(merged, layer, total, moment(x))
        total = total + moment(x)
    stacked = torch.cat(inputs)
    outputs = torch.cat([x @ layer.T for x, layer in zip(inputs, layers, strict=True)])
    expected = torch.linalg.lstsq(stacked, outputs).solution.T
    torch.testing.assert_close(merged, expected, rtol=1e-3, atol=1e-3)
    # Not by chance: the plain mean is far from it.
    assert (torch.stack(layers).mean(0) - expected).abs().max() > 0.1


@pytest.mark.parametrize("off_diagonal", [0.1, 0.9])
def test_merge_off_diagonal_entries_are_scaled(off_diagonal: float) -> None:
    x, y = vectors(30, 1), vectors(30, 2)
    old, new = matrix(3), matrix(4)
    factors = torch.full((WIDTH, WIDTH), off_diagonal, dtype=torch.float64).fill_diagonal_(1.0)
    before, latest = ((v.T @ v / len(v)) * factors for v in (x, y))
    expected = (old @ before + new @ latest) @ torch.linalg.inv(before + latest)
    found = merge(old, new, moment(x), moment(y), off_diagonal=off_diagonal)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("off_diagonal", [0.9, 1.0])
def test_merge_elements_that_are_always_zero_keep_new_weights(off_diagonal: float) -> None:
    x, y = vectors(30, 1), vectors(30, 2)
    x[:, [0, 4]] = 0.0
    y[:, [0, 4]] = 0.0
    old, new = matrix(3), matrix(4)
    found = merge(old, new, moment(x), moment(y), off_diagonal=off_diagonal)
    assert found[:, [0, 4]].equal(new[:, [0, 4]])
    used = [1, 2, 3, 5, 6]
    smaller = (moment(x)[used][:, used], moment(y)[used][:, used])
    torch.testing.assert_close(
        found[:, used], merge(old[:, used], new[:, used], *smaller, off_diagonal=off_diagonal), rtol=1e-4, atol=1e-4
    )


def test_merge_of_singular_moments_keeps_both_outputs_and_stays_between() -> None:
    """Two and three vectors in 64 dimensions: both layers' outputs can be had, and nothing else is changed much."""
    x, y = (vectors(num, num, width=64) for num in (2, 3))
    old, new = matrix(3, 64), matrix(4, 64)
    found = merge(old, new, moment(x), moment(y))
    torch.testing.assert_close(x @ found.T, x @ old.T, rtol=0.0, atol=1e-2 * float((x @ (old - new).T).abs().max()))
    torch.testing.assert_close(y @ found.T, y @ new.T, rtol=0.0, atol=1e-2 * float((y @ (old - new).T).abs().max()))


def test_merge_of_moments_of_zeros_keeps_new_weights() -> None:
    nothing = torch.zeros(WIDTH, WIDTH)
    old, new = matrix(3), matrix(4)
    assert merge(old, new, nothing, nothing).equal(new)


def test_merge_of_equal_moments_is_the_mean() -> None:
    x = moment(vectors(30, 1))
    old, new = matrix(3), matrix(4)
    found = merge(old, new, x, x, off_diagonal=0.9)
    torch.testing.assert_close(found, (old + new) / 2, rtol=1e-4, atol=1e-4)
