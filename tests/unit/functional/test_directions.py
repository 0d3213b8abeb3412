"""Masks of directions against their eigenvectors."""

from __future__ import annotations

import pytest
import torch

from das_ds.functional.directions import (
    MAX_FACTOR_ERROR,
    best_flattening,
    build_projector,
    decompose_moment,
    describe_invalid_moment,
    direction_projector,
    joint_saturation,
    passing_energy,
    plasticity,
)
from das_ds.functional.projectors import DenseProjector, LowRankProjector

WIDTH = 96


def moment(*, rank: int, width: int = 6) -> torch.Tensor:
    """M of random inputs, with trace d."""
    inputs = torch.randn(40, rank, generator=torch.Generator().manual_seed(3)) @ torch.randn(
        rank, width, generator=torch.Generator().manual_seed(4)
    )
    total = inputs.T @ inputs
    return total / total.diagonal().mean()


@pytest.mark.parametrize("saturation", [0.1, 1.0, 30.0])
def test_direction_projector_equals_saturating_mask(saturation: float) -> None:
    relative = moment(rank=6)
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
    mask = direction_projector(of_three, 1e-3)
    torch.testing.assert_close(new.T @ mask, new.T, rtol=0, atol=1e-3)
    assert (old.T @ mask).abs().max() < 1e-2


@pytest.mark.parametrize("num_domains", [1, 3])
def test_joint_saturation_gives_the_mask_of_the_mean(num_domains: int) -> None:
    domains = [moment(rank=rank) for rank in range(2, 2 + num_domains)]
    total = torch.stack(domains).sum(dim=0)
    mean = torch.stack(domains).double().mean(dim=0)
    expected = torch.linalg.inv(torch.eye(6, dtype=torch.float64) + mean / 0.4)
    found = direction_projector(total, joint_saturation(total, 0.4, "mean"))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    assert joint_saturation(total, 0.4, "sum") == 0.4
    assert joint_saturation(torch.zeros(6, 6), 0.4, "mean") == 0.4


def test_direction_projector_zero_moment_is_identity() -> None:
    torch.testing.assert_close(direction_projector(torch.zeros(4, 4), 0.5), torch.eye(4))


@pytest.mark.parametrize("saturation", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize("rank", [1, 5])
def test_direction_projector_eigenvalues_at_most_one(saturation: float, rank: int) -> None:
    """Moments summed in float32 have eigenvalues below 0, which a small saturation blows up."""
    relative = moment(rank=rank, width=64)
    shares, vectors = torch.linalg.eigh(relative.double())
    assert shares[0] < -1e-8
    mask = direction_projector(relative, saturation).double()
    factors = torch.linalg.eigvalsh(mask)
    assert factors[-1] <= 1.0 + 1e-5 and factors[0] >= -1e-6
    torch.testing.assert_close(mask, mask.T, rtol=0, atol=0)
    old = vectors[:, -rank:]
    expected = saturation / (saturation + shares[-rank:])
    torch.testing.assert_close((old * (mask @ old)).sum(dim=0), expected, rtol=1e-4, atol=1e-6)


def test_describe_invalid_moment_names_fault() -> None:
    sound = moment(rank=6)
    assert describe_invalid_moment(sound) is None and describe_invalid_moment(torch.zeros(6, 6)) is None
    assert describe_invalid_moment(moment(rank=2, width=64)) is None
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


def spectrum(width: int = WIDTH) -> torch.Tensor:
    """Eigenvalues with mean 3, descending as 1 / i and then steeply: as those of an encoder's inputs over 3 domains."""
    numbers = torch.arange(1, width + 1, dtype=torch.float64)
    values = torch.exp(-6.0 * (numbers / width) ** 4) / numbers
    return 3.0 * values / values.mean()


def rotation(width: int = WIDTH) -> torch.Tensor:
    """Random eigenvectors (d, d) float64."""
    normal = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return torch.linalg.qr(normal)[0]


def encoder_moment(width: int = WIDTH) -> torch.Tensor:
    vectors = rotation(width)
    return ((vectors * spectrum(width)) @ vectors.T).float()


def as_matrix(projector: DenseProjector | LowRankProjector) -> torch.Tensor:
    return projector.project(torch.eye(projector.width)).double()


def all_flattenings(saturation: float, rank: int) -> list[tuple[float, list[int], float]]:
    """Error, flattened directions and tail of every run of d - r neighbors in the order of eigenvalues."""
    values = spectrum()
    found = []
    for start in range(rank + 1):
        run = list(range(start, start + WIDTH - rank))
        tail = saturation / (saturation + float(values[run].mean()))
        error = max(abs(tail - saturation / (saturation + float(values[i]))) for i in run)
        found.append((error, run, tail))
    return found


def test_build_projector_full_is_exact() -> None:
    built = build_projector(encoder_moment(), 3.0, "full")
    assert isinstance(built, DenseProjector)
    torch.testing.assert_close(built.matrix, direction_projector(encoder_moment(), 3.0), rtol=0, atol=0)


@pytest.mark.parametrize("saturation", [0.05, 0.2, 1.0, 3.0])
@pytest.mark.parametrize("rank", [1, 16, 48])
def test_build_projector_rank_flattens_best_run(saturation: float, rank: int) -> None:
    built = build_projector(encoder_moment(), saturation, rank)
    assert isinstance(built, LowRankProjector) and built.gains.numel() == rank
    _, run, tail = min(all_flattenings(saturation, rank))
    factors = saturation / (saturation + spectrum())
    factors[run] = tail
    vectors = rotation()
    # Eigenvalues of M in float32 err by 1e-6 of the largest, which a small saturation multiplies.
    torch.testing.assert_close(as_matrix(built), (vectors * factors) @ vectors.T, rtol=0, atol=2e-5 / saturation)


@pytest.mark.parametrize("saturation", [0.05, 1.0, 3.0, 30.0])
def test_build_projector_auto_is_smallest_rank_within_bound(saturation: float) -> None:
    built = build_projector(encoder_moment(), saturation, "auto")
    enough = [r for r in range(1, WIDTH // 2 + 1) if min(all_flattenings(saturation, r))[0] <= MAX_FACTOR_ERROR]
    if enough:
        assert isinstance(built, LowRankProjector) and built.gains.numel() == enough[0]
    else:
        assert isinstance(built, DenseProjector)
    exact = direction_projector(encoder_moment(), saturation).double()
    assert torch.linalg.matrix_norm(as_matrix(built) - exact, 2) <= MAX_FACTOR_ERROR + 1e-5


def test_build_projector_auto_covers_low_rank_and_dense() -> None:
    """A saturation far from all eigenvalues needs few directions, one amid them more than the dense form has."""
    assert isinstance(build_projector(encoder_moment(), 30.0, "auto"), LowRankProjector)
    assert isinstance(build_projector(encoder_moment(), 1.0, "auto"), DenseProjector)


SPECTRA = {
    "exponential": torch.logspace(0, -6, 400, dtype=torch.float64),
    "power": torch.arange(1, 401, dtype=torch.float64) ** -2,
    "one direction has 99 %": torch.cat([torch.ones(1), torch.logspace(-4, -6, 399)]).double(),
}
"""Descending, with a condition number of 1e5 to 1e6."""


@pytest.mark.parametrize("saturation", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("name", list(SPECTRA))
def test_decompose_moment_in_float32_is_accurate(name: str, saturation: float) -> None:
    """Against a decomposition of M in float64: factors, P, and what flattening leaves of P; at most 1e-3 at any width.

    The bound grows as d^(5/6): from 400 to 28,672 it is 35 times as large.
    """
    values = SPECTRA[name].flip(0)
    vectors = rotation(len(values))
    moment = ((vectors * (values / values.mean())) @ vectors.T).float()
    exact_values, exact_vectors = torch.linalg.eigh(moment.double())
    exact_factors = saturation / (saturation + exact_values.clamp_min(0.0))
    exact = (exact_vectors * exact_factors) @ exact_vectors.T
    found, found_vectors = decompose_moment(moment, saturation)
    assert found_vectors.dtype == torch.float32
    factors = saturation / (saturation + found)
    assert (factors - exact_factors).abs().max() <= 1e-3 / 35
    rebuilt = (found_vectors.double() * factors) @ found_vectors.double().T
    assert torch.linalg.matrix_norm(rebuilt - exact, 2) <= 1e-3 / 35
    for rank in (25, 100):
        best = best_flattening(exact_values.clamp_min(0.0), saturation, rank)
        chosen = best_flattening(found, saturation, rank)
        assert chosen.tail == pytest.approx(best.tail, abs=1e-3 / 35) or chosen.start != best.start
        projector = as_matrix(build_projector(moment, saturation, rank))
        # Whatever directions it flattens: not worse than the best choice.
        assert torch.linalg.matrix_norm(projector - exact, 2) <= best.error + 1e-3 / 35


def test_decompose_moment_plain_float32_would_not_be() -> None:
    """What the saturated matrix is for: of M itself float32 errs by rounding of the largest eigenvalue, over c."""
    values = SPECTRA["one direction has 99 %"]
    vectors = rotation(len(values))
    moment = ((vectors * (values / values.mean())) @ vectors.T).float()
    plain, plain_vectors = torch.linalg.eigh(moment)
    rebuilt = (plain_vectors.double() * (0.2 / (0.2 + plain.double().clamp_min(0.0)))) @ plain_vectors.double().T
    exact = torch.linalg.inv(torch.eye(len(values)).double() + moment.double() / 0.2)
    assert torch.linalg.matrix_norm(rebuilt - exact, 2) > 1e-3


def test_build_projector_keeps_used_or_open_directions() -> None:
    """With a large c the smallest eigenvalues share a factor near 1, with a small one the largest one near 0."""
    ascending = spectrum().flip(0)
    open_ones = best_flattening(ascending, 30.0, 12)
    assert open_ones.start == 0 and open_ones.tail > 0.9
    closed_ones = best_flattening(ascending, 0.005, 12)
    assert closed_ones.stop == WIDTH and closed_ones.tail < 0.1


def test_build_projector_rank_above_half_is_dense() -> None:
    assert isinstance(build_projector(encoder_moment(), 3.0, WIDTH // 2), LowRankProjector)
    built = build_projector(encoder_moment(), 3.0, WIDTH // 2 + 1)
    assert isinstance(built, DenseProjector)
    torch.testing.assert_close(built.matrix, direction_projector(encoder_moment(), 3.0), rtol=0, atol=0)


def test_build_projector_zero_moment_is_identity() -> None:
    for rank in (1, 2, "auto", "full"):
        torch.testing.assert_close(as_matrix(build_projector(torch.zeros(4, 4), 0.5, rank)), torch.eye(4).double())


def test_build_projector_negative_rounding_factors_at_most_one() -> None:
    relative = moment(rank=5, width=64)
    built = build_projector(relative, 1e-6, 8)
    factors = torch.linalg.eigvalsh(as_matrix(built))
    assert factors[-1] <= 1.0 + 1e-5 and factors[0] >= -1e-5


@pytest.mark.parametrize("rank", [0, -3])
def test_build_projector_rank_below_one_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank: found {rank}, expected 1 or more, full or auto"):
        build_projector(encoder_moment(), 3.0, rank)


@pytest.mark.parametrize("rank", ["full", 16])
def test_plasticity_is_mean_factor(rank: int | str) -> None:
    built = build_projector(encoder_moment(), 3.0, rank)
    assert plasticity(built) == pytest.approx(float(torch.linalg.eigvalsh(as_matrix(built)).mean()), abs=1e-6)


@pytest.mark.parametrize("rank", ["full", 16])
@pytest.mark.parametrize("block_size", [None, 1024, 40])
def test_passing_energy_is_that_of_projected_inputs(rank: int | str, block_size: int | None) -> None:
    built = build_projector(encoder_moment(), 1.0, rank)
    inputs = torch.randn(500, WIDTH, generator=torch.Generator().manual_seed(8)) * torch.linspace(0, 2, WIDTH)
    passing = passing_energy(built, inputs.T @ inputs, block_size)
    expected = (inputs.double() @ as_matrix(built)).square().sum() / inputs.double().square().sum()
    assert passing == pytest.approx(float(expected), rel=1e-5)


def test_passing_energy_of_zero_input_is_one() -> None:
    assert passing_energy(build_projector(encoder_moment(), 3.0, "full"), torch.zeros(WIDTH, WIDTH)) == 1.0
