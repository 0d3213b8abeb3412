"""Projectors against matrices in float64."""

from __future__ import annotations

import pytest
import torch

from das_ds.functional.projectors import DenseProjector, LowRankProjector, Projector, multiply, runs_in_16_bits

WIDTH = 192
RANK = 40


def orthonormal(rank: int = RANK) -> torch.Tensor:
    normal = torch.randn(WIDTH, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return torch.linalg.qr(normal)[0]


def factors() -> torch.Tensor:
    """From nearly closed to half open."""
    return torch.logspace(-4, -0.3, RANK, dtype=torch.float64)


TAIL = 0.9


def exact_matrix() -> torch.Tensor:
    """tau I + V diag(s - tau) V^T in float64."""
    basis = orthonormal()
    return TAIL * torch.eye(WIDTH, dtype=torch.float64) + (basis * (factors() - TAIL)) @ basis.T


def low_rank(dtype: torch.dtype = torch.float32) -> LowRankProjector:
    return LowRankProjector.from_factors(orthonormal(), factors(), TAIL, dtype)


def drawn_vectors(count: int = 30) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(2))


def projectors() -> list[Projector]:
    return [DenseProjector(exact_matrix().float()), low_rank(), low_rank(torch.bfloat16)]


def test_low_rank_float32_equals_matrix() -> None:
    expected = drawn_vectors().double() @ exact_matrix()
    torch.testing.assert_close(low_rank().project(drawn_vectors()).double(), expected, rtol=0, atol=5e-6)


def test_low_rank_bfloat16_basis_errs_within_bound() -> None:
    """Float32 vectors lose the rounding of V and nothing else."""
    projector = low_rank(torch.bfloat16)
    matrix = projector.project(torch.eye(WIDTH)).double()
    assert torch.linalg.matrix_norm(matrix - exact_matrix(), 2) <= 2.0**-8
    rounded = projector.basis.double()
    stored = TAIL * torch.eye(WIDTH, dtype=torch.float64) + (rounded * projector.gains.double()) @ rounded.T
    torch.testing.assert_close(matrix, stored, rtol=0, atol=1e-6)


def test_low_rank_bfloat16_basis_keeps_smallest_factors() -> None:
    """Along a closed direction the rounded basis cancels as well as the exact one, up to errors squared."""
    basis = orthonormal()
    closed = low_rank(torch.bfloat16).project(basis.T.float()).double()
    torch.testing.assert_close((closed * basis.T).sum(dim=1), factors(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("basis", [torch.float32, torch.bfloat16])
def test_low_rank_16_bit_vectors_round_result_only(dtype: torch.dtype, basis: torch.dtype) -> None:
    vectors = drawn_vectors().to(dtype)
    result = low_rank(basis).project(vectors)
    assert result.dtype == dtype
    # The product itself is in float32 on a CPU.
    expected = low_rank(basis).project(vectors.float())
    torch.testing.assert_close(result, expected.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_trace_and_size_are_those_of_matrix(index: int) -> None:
    projector = projectors()[index]
    matrix = projector.project(torch.eye(WIDTH)).double()
    assert projector.trace == pytest.approx(float(matrix.trace()), rel=1e-6)
    expected = (4 * WIDTH**2, 4 * WIDTH * RANK + 4 * RANK, 2 * WIDTH * RANK + 4 * RANK)[index]
    assert projector.num_bytes == expected
    assert projector.width == WIDTH


def test_low_rank_never_forms_a_square_matrix() -> None:
    """The largest tensor of a product is one of its factors or its result."""
    sizes: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            sizes.append(result.numel())
            return result

    projector = low_rank(torch.bfloat16)
    vectors = drawn_vectors()
    with Sizes():
        projector.project(vectors)
    assert max(sizes) == max(vectors.numel(), projector.basis.numel()) < WIDTH**2


def test_from_factors_float16_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype: found torch.float16, expected torch.float32 or torch.bfloat16"):
        low_rank(torch.float16)


def test_multiply_sums_in_float32() -> None:
    """In bfloat16 1 + 2^-9 would be 1."""
    left = torch.tensor([[1.0, 2.0**-9]], dtype=torch.bfloat16)
    right = torch.ones(2, 1, dtype=torch.bfloat16)
    assert multiply(left, right).item() == 1.0 + 2.0**-9
    assert not runs_in_16_bits(left, right)


@pytest.mark.gpu
def test_low_rank_on_gpu_multiplies_16_bits_within_bound() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    projector = low_rank(torch.bfloat16)
    on_gpu = LowRankProjector(projector.basis.cuda(), projector.gains.cuda(), projector.tail)
    vectors = drawn_vectors().bfloat16()
    assert runs_in_16_bits(vectors.cuda(), on_gpu.basis)
    expected = projector.project(vectors.float())
    error = (on_gpu.project(vectors.cuda()).float().cpu() - expected).norm(dim=1) / vectors.float().norm(dim=1)
    # The rounding of the code, and that of the result.
    assert error.max() <= 2.0**-8
