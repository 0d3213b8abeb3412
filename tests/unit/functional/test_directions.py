"""Masks of directions against their eigenvectors."""

from __future__ import annotations

import pytest
import torch

from das_ds.functional.directions import describe_invalid_moment, direction_projector, normalized_second_moment


def moment(*, rank: int, width: int = 6) -> torch.Tensor:
    inputs = torch.randn(40, rank, generator=torch.Generator().manual_seed(3)) @ torch.randn(
        rank, width, generator=torch.Generator().manual_seed(4)
    )
    return inputs.T @ inputs / 40


def test_normalized_second_moment_ignores_scale() -> None:
    relative = normalized_second_moment(moment(rank=6))
    assert relative.trace().item() == pytest.approx(6.0, rel=1e-6)
    torch.testing.assert_close(normalized_second_moment(1e-9 * moment(rank=6)), relative)
    assert not normalized_second_moment(torch.zeros(6, 6)).any()


@pytest.mark.parametrize("saturation", [0.1, 1.0, 30.0])
def test_direction_projector_equals_saturating_mask(saturation: float) -> None:
    relative = normalized_second_moment(moment(rank=6))
    shares, vectors = torch.linalg.eigh(relative.double())
    # 1 - I of I = a / (a + c).
    factors = 1.0 - shares / (shares + saturation)
    expected = vectors @ torch.diag(factors) @ vectors.T
    torch.testing.assert_close(direction_projector(relative, saturation).double(), expected, rtol=0, atol=1e-6)


def test_direction_projector_small_saturation_frees_unused_directions() -> None:
    of_three = moment(rank=3)
    _, vectors = torch.linalg.eigh(of_three.double())
    new = vectors[:, :3].float()
    old = vectors[:, 3:].float()
    mask = direction_projector(normalized_second_moment(of_three), 1e-3)
    torch.testing.assert_close(new.T @ mask, new.T, rtol=0, atol=1e-3)
    assert (old.T @ mask).abs().max() < 1e-2


def test_direction_projector_zero_moment_is_identity() -> None:
    torch.testing.assert_close(direction_projector(torch.zeros(4, 4), 0.5), torch.eye(4))


@pytest.mark.parametrize("saturation", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize("rank", [1, 5])
def test_direction_projector_eigenvalues_at_most_one(saturation: float, rank: int) -> None:
    """Moments summed in float32 have eigenvalues below 0, which a small saturation blows up."""
    relative = normalized_second_moment(moment(rank=rank, width=64))
    shares, vectors = torch.linalg.eigh(relative.double())
    assert shares[0] < -1e-8
    mask = direction_projector(relative, saturation).double()
    factors = torch.linalg.eigvalsh(mask)
    assert factors[-1] <= 1.0 + 1e-5 and factors[0] >= -1e-6
    torch.testing.assert_close(mask, mask.T, rtol=0, atol=0)
    old = vectors[:, -rank:]
    expected = saturation / (saturation + shares[-rank:])
    torch.testing.assert_close((old * (mask @ old)).sum(dim=0), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_normalized_second_moment_not_finite_stays_not_finite(value: float) -> None:
    broken = moment(rank=6)
    broken[2, :] = broken[:, 2] = value
    assert not normalized_second_moment(broken).isfinite().all()


def test_describe_invalid_moment_names_fault() -> None:
    sound = normalized_second_moment(moment(rank=6))
    assert describe_invalid_moment(sound) is None and describe_invalid_moment(torch.zeros(6, 6)) is None
    assert describe_invalid_moment(normalized_second_moment(moment(rank=2, width=64))) is None
    faults = {
        "not finite": (2, 3, float("nan")),
        "negative": (2, 2, -1.0),
        "not symmetric": (2, 3, float(sound[2, 3]) + 1.0),
    }
    for words, (row, column, value) in faults.items():
        broken = sound.clone()
        broken[row, column] = value
        assert words in str(describe_invalid_moment(broken))
    broken = sound.clone()
    broken[2, 3] = broken[3, 2] = 100.0
    assert "larger than those on the diagonal allow" in str(describe_invalid_moment(broken))
