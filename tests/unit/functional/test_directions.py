"""Masks of directions against their eigenvectors."""

from __future__ import annotations

import pytest
import torch

from das_ds.functional.directions import direction_mask, relative_moment


def moment(*, rank: int, width: int = 6) -> torch.Tensor:
    inputs = torch.randn(40, rank, generator=torch.Generator().manual_seed(3)) @ torch.randn(
        rank, width, generator=torch.Generator().manual_seed(4)
    )
    return inputs.T @ inputs / 40


def test_the_relative_moment_knows_no_scale() -> None:
    relative = relative_moment(moment(rank=6))
    assert relative.trace().item() == pytest.approx(6.0, rel=1e-6)
    torch.testing.assert_close(relative_moment(1e-9 * moment(rank=6)), relative)
    assert not relative_moment(torch.zeros(6, 6)).any()


@pytest.mark.parametrize("saturation", [0.1, 1.0, 30.0])
def test_a_direction_keeps_what_the_saturating_mask_leaves_it(saturation: float) -> None:
    relative = relative_moment(moment(rank=6))
    shares, vectors = torch.linalg.eigh(relative.double())
    # 1 - I of I = a / (a + c).
    factors = 1.0 - shares / (shares + saturation)
    expected = vectors @ torch.diag(factors) @ vectors.T
    torch.testing.assert_close(direction_mask(relative, saturation).double(), expected, rtol=0, atol=1e-6)


def test_what_never_came_in_learns_freely_and_the_rest_hardly() -> None:
    of_three = moment(rank=3)
    _, vectors = torch.linalg.eigh(of_three.double())
    new, old = vectors[:, :3].float(), vectors[:, 3:].float()
    mask = direction_mask(relative_moment(of_three), 1e-3)
    torch.testing.assert_close(new.T @ mask, new.T, rtol=0, atol=1e-3)
    assert (old.T @ mask).abs().max() < 1e-2


def test_nothing_is_masked_where_nothing_is_known() -> None:
    torch.testing.assert_close(direction_mask(torch.zeros(4, 4), 0.5), torch.eye(4))
