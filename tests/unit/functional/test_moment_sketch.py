"""Sketches of second moments against the moments, on spectra like those of an encoder's inputs."""

from __future__ import annotations

import pytest
import torch

from das_ds.functional.directions import (
    MAX_FACTOR_ERROR,
    direction_projector,
    half_saturation_for,
    normalized_second_moment,
    passing_energy,
    plasticity,
)
from das_ds.functional.moment_sketch import OVERSAMPLING, MomentSketch, RandomSigns
from das_ds.functional.projectors import DenseProjector, LowRankProjector

WIDTH = 256
COLUMNS = 96
CPU = torch.device("cpu")


def draw_inputs(count: int, decay: float = 1.0, seed: int = 3, width: int = WIDTH, used: int = WIDTH) -> torch.Tensor:
    """Inputs (n, d) whose second moment has eigenvalues of about i^-decay, then 0, in random directions."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.arange(1, width + 1).float() ** (-decay / 2.0)
    scales[used:] = 0.0
    rotation = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(9)))[0]
    return (torch.randn(count, width, generator=generator) * scales) @ rotation.T


def sketch_of(inputs: torch.Tensor, num_columns: int = COLUMNS, seed: int = 0) -> MomentSketch:
    sketch = MomentSketch.zeros(RandomSigns(inputs.shape[1], num_columns, seed), CPU)
    for batch in inputs.split(100):
        sketch.add(batch)
    return sketch


def as_matrix(projector: LowRankProjector) -> torch.Tensor:
    return projector.project(torch.eye(projector.width)).double()


def relative(inputs: torch.Tensor) -> torch.Tensor:
    return normalized_second_moment(inputs.T @ inputs)


def test_random_signs_same_for_same_seed_only() -> None:
    signs = RandomSigns(2100, 5, seed=7)
    drawn = signs.on(CPU).clone()
    assert set(drawn.unique().tolist()) == {-1.0, 1.0} and abs(float(drawn.float().mean())) < 0.05
    signs.free()
    torch.testing.assert_close(signs.on(CPU), drawn, rtol=0, atol=0)
    assert (RandomSigns(2100, 5, seed=8).on(CPU) != drawn).any()
    # Written out, because files of another machine and version must stay readable.
    assert RandomSigns(4, 3, seed=7).on(CPU).tolist() == [[1, -1, 1], [-1, 1, 1], [1, 1, -1], [1, -1, 1]]


def test_add_is_moment_times_signs() -> None:
    inputs = draw_inputs(300)
    sketch = sketch_of(inputs)
    moment = inputs.double().T @ inputs.double()
    torch.testing.assert_close(sketch.products.double(), moment @ sketch.signs.on(CPU).double(), rtol=1e-4, atol=1e-3)
    assert float(sketch.trace) == pytest.approx(float(moment.trace()), rel=1e-6)


def test_add_sketch_equals_sketch_of_all() -> None:
    inputs = draw_inputs(400)
    first = sketch_of(inputs[:150])
    first.add_sketch(sketch_of(inputs[150:]))
    whole = sketch_of(inputs)
    torch.testing.assert_close(first.products, whole.products, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(first.trace, whole.trace)


def test_add_sketch_other_signs_refused() -> None:
    inputs = draw_inputs(10)
    with pytest.raises(ValueError, match=r"sketch: found one of .*seed=1.*, expected one of .*seed=0"):
        sketch_of(inputs).add_sketch(sketch_of(inputs, seed=1))


def test_normalized_sum_over_domains_is_that_of_moments() -> None:
    """Of two domains with inputs of different size."""
    domains = [draw_inputs(400), 30.0 * draw_inputs(400, seed=4)]
    total = sketch_of(domains[0]).normalized()
    total.add_sketch(sketch_of(domains[1]).normalized())
    moment = relative(domains[0]) + relative(domains[1])
    torch.testing.assert_close(total.products, moment @ total.signs.on(CPU).float(), rtol=1e-3, atol=1e-3)
    assert float(total.trace) == pytest.approx(2.0 * WIDTH)


def test_decompose_finds_all_of_low_rank_moment() -> None:
    """A moment of fewer directions than the sketch has columns is recovered up to the rounding of its sums."""
    inputs = draw_inputs(500, used=40)
    values, vectors = sketch_of(inputs).decompose(COLUMNS - OVERSAMPLING)
    expected, _ = torch.linalg.eigh(inputs.double().T @ inputs.double())
    assert len(values) == 40
    torch.testing.assert_close(values, expected.flip(0)[:40], rtol=0, atol=2e-5 * float(expected[-1]))
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(40).double(), rtol=0, atol=1e-8)
    moment = inputs.double().T @ inputs.double()
    rebuilt = (vectors * values) @ vectors.T
    assert torch.linalg.matrix_norm(rebuilt - moment, 2) <= 2e-5 * expected[-1]


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_decompose_is_independent_of_scale(scale: float) -> None:
    inputs = draw_inputs(300)
    values, vectors = sketch_of(inputs).decompose(20)
    scaled_values, scaled_vectors = sketch_of(inputs * scale**0.5).decompose(20)
    torch.testing.assert_close(scaled_values / scale, values, rtol=1e-3, atol=0)
    torch.testing.assert_close((scaled_vectors * vectors).sum(dim=0).abs(), torch.ones(20).double(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("decay", [1.0, 1.3, 2.0])
def test_decompose_never_above_moment(decay: float) -> None:
    """Nystroem approximations are below A; their error is at most that of the paper's theorem."""
    inputs = draw_inputs(600, decay)
    exact = torch.linalg.eigvalsh(inputs.double().T @ inputs.double()).flip(0)
    rank = COLUMNS - OVERSAMPLING
    values, _ = sketch_of(inputs).decompose(rank)
    assert (values <= exact[:rank] * (1.0 + 1e-4)).all()
    missing = float(exact.sum() - values.sum()) / float(exact[rank:].sum())
    assert missing <= 1.0 + rank / (COLUMNS - rank - 1)


def test_decompose_one_huge_direction_keeps_others() -> None:
    """Language models have a direction with nearly all energy; the rest is not lost in the rounding of its sums."""
    inputs = draw_inputs(500, used=30)
    inputs[:, 5] += 30.0
    values, _ = sketch_of(inputs).decompose(COLUMNS - OVERSAMPLING)
    exact = torch.linalg.eigvalsh(inputs.double().T @ inputs.double()).flip(0)
    torch.testing.assert_close(values[:10], exact[:10], rtol=0, atol=3e-6 * float(exact[0]))
    assert values.sum() <= exact.sum() * 1.001


@pytest.mark.parametrize("saturation", [1.0, 3.0])
def test_projector_error_against_exact(saturation: float) -> None:
    """Stated errors: leak of earlier inputs at most 1.5 times the exact mask's, plasticity at least 0.75 of it."""
    inputs = draw_inputs(4000)
    moment = relative(inputs) * 3.0
    sketch = sketch_of(inputs, WIDTH // 3 + OVERSAMPLING).normalized()
    tripled = MomentSketch(sketch.signs, sketch.products * 3.0, sketch.trace * 3.0)
    projector = tripled.projector(saturation, rank=WIDTH // 3)
    exact = DenseProjector(direction_projector(moment, saturation))
    leak = passing_energy(projector, moment) / passing_energy(exact, moment)
    learns = plasticity(projector) / plasticity(exact)
    assert 0.9 <= leak <= 1.5 and 0.75 <= learns <= 1.0, (leak, learns)


def test_projector_auto_is_smallest_rank_within_bound() -> None:
    sketch = sketch_of(draw_inputs(2000, decay=2.0)).normalized()
    projector = sketch.projector(3.0)
    values, vectors = sketch.decompose(sketch.max_rank)

    def error(rank: int) -> float:
        tail = 3.0 / (3.0 + (WIDTH - float(values[:rank].sum())) / (WIDTH - rank))
        return max(1.0 - tail, tail - 3.0 / (3.0 + float(values[rank])))

    expected = next(rank for rank in range(1, len(values)) if error(rank) <= MAX_FACTOR_ERROR)
    assert projector.code_width == expected < sketch.max_rank
    kept = vectors[:, :expected]
    factors = 3.0 / (3.0 + values[:expected])
    tail = projector.tail
    matrix = tail * torch.eye(WIDTH).double() + (kept * (factors - tail)) @ kept.T
    torch.testing.assert_close(as_matrix(projector), matrix, rtol=0, atol=1e-6)


def test_projector_auto_without_enough_columns_takes_all() -> None:
    sketch = sketch_of(draw_inputs(500)).normalized()
    assert sketch.projector(0.05, dtype=torch.bfloat16).code_width == sketch.max_rank


def test_projector_of_zero_inputs_is_identity() -> None:
    sketch = sketch_of(torch.zeros(10, WIDTH)).normalized()
    for rank in (4, "auto"):
        torch.testing.assert_close(as_matrix(sketch.projector(0.5, rank)), torch.eye(WIDTH).double())


@pytest.mark.parametrize("rank", [0, COLUMNS - OVERSAMPLING + 1])
def test_projector_rank_outside_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank: found {rank}, expected 1 to {COLUMNS - OVERSAMPLING}"):
        sketch_of(draw_inputs(10)).projector(1.0, rank)


def test_projector_full_refused() -> None:
    with pytest.raises(ValueError, match="rank: found full, expected auto or 1 to"):
        sketch_of(draw_inputs(10)).projector(1.0, "full")


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_half_saturation_for_gives_plasticity(share: float) -> None:
    inputs = draw_inputs(2000, decay=1.5)
    sketch = sketch_of(inputs).normalized()
    saturation = sketch.half_saturation_for(share)
    assert plasticity(sketch.projector(saturation, sketch.max_rank)) == pytest.approx(share, rel=1e-5)
    # The flattened tail learns less at the same c, so that c is larger than that of the exact mask.
    assert 1.0 <= saturation / half_saturation_for(relative(inputs), share) <= 2.0


@pytest.mark.parametrize("name", ["same", "other"])
def test_passing_energy_estimates_that_of_moment(name: str) -> None:
    inputs = draw_inputs(2000)
    sketch = sketch_of(inputs).normalized()
    projector = sketch.projector(1.0, 64)
    measured = inputs if name == "same" else draw_inputs(2000, seed=6) * torch.linspace(0.1, 1.0, WIDTH)
    # Four standard deviations of an estimate from that many columns, were all energy in one direction.
    bound = 4.0 * (2.0 / COLUMNS) ** 0.5
    estimate = sketch_of(measured).passing_energy(projector)
    assert estimate == pytest.approx(passing_energy(projector, relative(measured)), rel=bound)


def test_passing_energy_of_zero_input_is_one() -> None:
    projector = sketch_of(draw_inputs(500)).projector(1.0, 8)
    assert sketch_of(torch.zeros(4, WIDTH)).passing_energy(projector) == 1.0


def test_describe_invalid_names_fault() -> None:
    sketch = sketch_of(draw_inputs(50))
    assert sketch.describe_invalid() is None
    faults = {
        "an entry that is not finite": MomentSketch(sketch.signs, sketch.products / 0.0, sketch.trace),
        "a negative trace": MomentSketch(sketch.signs, sketch.products, -sketch.trace),
    }
    for words, broken in faults.items():
        assert broken.describe_invalid() == words
        with pytest.raises(ValueError, match=f"sketch: found {words}, expected"):
            broken.decompose(4)


def test_decompose_products_of_no_moment_refused() -> None:
    sketch = sketch_of(draw_inputs(50))
    with pytest.raises(ValueError, match="sketch: found products and a trace"):
        MomentSketch(sketch.signs, sketch.products, sketch.trace * 1e-3).decompose(4)
