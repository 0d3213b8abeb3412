"""Sketches of second moments against the moments, on spectra like those of an encoder's inputs."""

from __future__ import annotations

import pytest
import torch

from benchmarks.moment_sketch import OVERSAMPLING, decompose_sketch, random_signs

WIDTH = 256
COLUMNS = 96
RANK = COLUMNS - OVERSAMPLING


def draw_inputs(count: int, decay: float = 1.0, used: int = WIDTH) -> torch.Tensor:
    """Inputs (n, d) whose second moment has eigenvalues of about i^-decay, then 0, in random directions."""
    scales = torch.arange(1, WIDTH + 1).float() ** (-decay / 2.0)
    scales[used:] = 0.0
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9)))[0]
    return (torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(3)) * scales) @ rotation.T


def decompose(inputs: torch.Tensor, rank: int = RANK) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the sketch in float32."""
    moment = inputs.T @ inputs
    signs = random_signs(WIDTH, COLUMNS)
    return decompose_sketch(signs, moment @ signs, float(moment.trace()), rank)


def eigenvalues(inputs: torch.Tensor) -> torch.Tensor:
    """In descending order."""
    return torch.linalg.eigvalsh(inputs.double().T @ inputs.double()).flip(0)


def test_random_signs_are_signs() -> None:
    signs = random_signs(2100, 5)
    assert set(signs.unique().tolist()) == {-1.0, 1.0} and abs(float(signs.mean())) < 0.05
    assert (random_signs(2100, 5, seed=8) != signs).any()


def test_decompose_finds_all_of_low_rank_moment() -> None:
    """A moment of fewer directions than the sketch has columns is recovered up to the rounding of its sums."""
    inputs = draw_inputs(500, used=40)
    values, vectors = decompose(inputs)
    moment = inputs.double().T @ inputs.double()
    largest = float(eigenvalues(inputs)[0])
    torch.testing.assert_close(values, eigenvalues(inputs)[:40], rtol=0, atol=2e-5 * largest)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(40).double(), rtol=0, atol=1e-8)
    assert torch.linalg.matrix_norm((vectors * values) @ vectors.T - moment, 2) <= 2e-5 * largest


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_decompose_is_independent_of_scale(scale: float) -> None:
    inputs = draw_inputs(300)
    values, vectors = decompose(inputs, 20)
    scaled_values, scaled_vectors = decompose(inputs * scale**0.5, 20)
    torch.testing.assert_close(scaled_values / scale, values, rtol=1e-3, atol=0)
    torch.testing.assert_close((scaled_vectors * vectors).sum(dim=0).abs(), torch.ones(20).double(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("decay", [1.0, 1.3, 2.0])
def test_decompose_never_above_moment(decay: float) -> None:
    """Nystroem approximations are below A; their error is at most that of the paper's theorem."""
    inputs = draw_inputs(600, decay)
    exact = eigenvalues(inputs)
    values, _ = decompose(inputs)
    assert (values <= exact[:RANK] * (1.0 + 1e-4)).all()
    missing = float(exact.sum() - values.sum()) / float(exact[RANK:].sum())
    assert missing <= 1.0 + RANK / (COLUMNS - RANK - 1)


def test_decompose_one_huge_direction_keeps_others() -> None:
    """Language models have a direction with nearly all energy; the rest is not lost in the rounding of its sums."""
    inputs = draw_inputs(500, used=30)
    inputs[:, 5] += 30.0
    values, _ = decompose(inputs)
    exact = eigenvalues(inputs)
    torch.testing.assert_close(values[:10], exact[:10], rtol=0, atol=3e-6 * float(exact[0]))
    assert values.sum() <= exact.sum() * 1.001


def test_decompose_products_of_no_moment_refused() -> None:
    signs = random_signs(WIDTH, COLUMNS)
    with pytest.raises(ValueError, match=r"sketch: found products that no second moment with a trace of 0\.001 has"):
        decompose_sketch(signs, signs, 1e-3, RANK)
