"""Projections of complete matrices by any number of ranks in one process, and what is planned of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from das_ds.functional.subspaces import TwoSidedProjector, freeze_leading_directions, num_frozen_directions
from das_ds.models.size import MatrixSize, Sharding
from das_ds.softmask.direction_mask import DirectionMask
from das_ds.softmask.direction_update_mask import DirectionUpdateMask
from das_ds.softmask.fragments import find_fragments
from das_ds.softmask.frozen_subspaces import FrozenSubspaces, SubspaceLayout, build_subspace_layout
from das_ds.softmask.hidden_matrices import HiddenMatrix, find_hidden_matrices
from das_ds.softmask.mask_layout import MaskLayout, plan_layout
from das_ds.softmask.matrix_blocks import find_held_elements
from das_ds.softmask.subspace_memory import PlannedSubspaces, plan_matrix_loads
from helpers.direction_masks import (
    CPU,
    SHAPES,
    SIZES,
    collect,
    cut_values,
    lay_out,
    model_size,
    random_values,
    run_together,
)
from helpers.fake_run import make_run
from helpers.two_domains import leading_directions, project_out
from helpers.zero_layout import owned

MATRICES = [
    HiddenMatrix("query", "query", 0, 5, 7),
    HiddenMatrix("key", "key", 0, 3, 7),
    HiddenMatrix("conv", "conv", 0, 7, 4),
    *(HiddenMatrix(f"experts[{i}]", "experts", 30 * i, 6, 5) for i in range(3)),
    HiddenMatrix("wide", "wide", 0, 2, 31),
]
RATIO = 0.4


def make_projectors(weights: dict[str, torch.Tensor]) -> dict[str, TwoSidedProjector]:
    return {
        m.name: freeze_leading_directions(pick(weights, m), num_frozen_directions(m.num_rows, m.num_columns, RATIO))
        for m in MATRICES
    }


def pick(values: dict[str, torch.Tensor], matrix: HiddenMatrix) -> torch.Tensor:
    return (
        values[matrix.parameter]
        .flatten()[matrix.start : matrix.start + matrix.numel]
        .view(matrix.num_rows, matrix.num_columns)
    )


def project_plainly(weights: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """In float64."""
    products = {name: value.double().clone() for name, value in values.items()}
    for matrix in MATRICES:
        product = project_out(pick(values, matrix).double(), *leading_directions(pick(weights, matrix).double(), RATIO))
        products[matrix.parameter].view(-1)[matrix.start : matrix.start + matrix.numel] = product.flatten()
    return products


def cut(stage: int, num_ranks: int) -> tuple[list[list[Any]], list[MaskLayout]]:
    """Shards and layouts of all ranks."""
    shards_by_rank = [lay_out(owned(SIZES, stage, rank, num_ranks)) for rank in range(num_ranks)]
    vectors = [matrix.as_vector() for matrix in MATRICES]
    held_by_rank = [find_held_elements(shards, vectors) for shards in shards_by_rank]
    fragments = find_fragments(vectors, held_by_rank).values()
    return shards_by_rank, [plan_layout(vectors, h, fragments, rank, num_ranks) for rank, h in enumerate(held_by_rank)]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 24, 97])
@pytest.mark.parametrize("stage", [1, 3])
def test_gradients_and_updates_equal_projection_of_complete_matrices(stage: int, num_ranks: int) -> None:
    weights, values = random_values(1), random_values(2)
    projectors = make_projectors(weights)
    shards_by_rank, layouts = cut(stage, num_ranks)
    expected = project_plainly(weights, values)
    gradients = cut_values(shards_by_rank, values)
    masks = [DirectionMask(s, layout, projectors, CPU) for s, layout in zip(shards_by_rank, layouts, strict=True)]
    run_together([m.steps(g, torch._foreach_copy_) for m, g in zip(masks, gradients, strict=True)])
    found = collect(shards_by_rank, gradients)
    flats = []
    finishes = []
    for shards, layout, own in zip(shards_by_rank, layouts, cut_values(shards_by_rank, values), strict=True):
        numel = shards[0].flat.numel() if shards else 0
        old = torch.zeros(numel)
        new = torch.zeros(numel)
        for shard, update in zip(shards, own, strict=True):
            new[shard.span] = update
        mask = DirectionUpdateMask(shards, layout, projectors, CPU, numel)
        for chunk in mask.chunks():
            mask.blend_(new[chunk], old[chunk], chunk)
        flats.append(new)
        finishes.append(mask.finish_steps(new))
    run_together(finishes)
    updates = [[flat[shard.span] for shard in shards] for flat, shards in zip(flats, shards_by_rank, strict=True)]
    moved = collect(shards_by_rank, updates)
    for name, value in expected.items():
        for result in (found, moved):
            torch.testing.assert_close(result[name], value, rtol=1e-4, atol=1e-4, msg=f"{name} on {num_ranks} ranks")


def test_ranks_that_share_all_matrices_take_turns() -> None:
    vectors = [HiddenMatrix(f"w{i}", f"w{i}", 0, 4, 6).as_vector() for i in range(8)]
    sizes = {vector.parameter: (vector.numel, True) for vector in vectors}
    held = [find_held_elements(lay_out(owned(sizes, 3, rank, 4)), vectors) for rank in range(4)]
    fragments = find_fragments(vectors, held)
    assert [fragments[number][0].owner for number in range(8)] == [0, 1, 2, 3] * 2


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 24])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_planned_loads_are_those_of_layouts(stage: int, num_ranks: int) -> None:
    numbers = list(SHAPES)
    size = model_size(
        MatrixSize(numbers.index(m.parameter), m.start, m.num_rows, m.num_columns, m.name) for m in MATRICES
    )
    loads = plan_matrix_loads(size, Sharding(stage, num_ranks, weight_bytes=4, gradient_bytes=4, num_moments=2))
    _, layouts = cut(stage, num_ranks)
    numels = {matrix.name: matrix.numel for matrix in MATRICES}
    for rank, (load, layout) in enumerate(zip(loads, layouts, strict=True)):
        assert load.owned == {name for cut in layout.rounds for name in cut.num_vectors}
        complete = {name for name, count in load.stepped.items() if count == numels[name]}
        assert complete == {batch.input for batch in layout.batches}
        outgoing = sum(sum(c.send_sizes) + sum(c.receive_sizes) for c in layout.rounds)
        kept = sum(c.send_sizes[rank] + c.receive_sizes[rank] for c in layout.rounds)
        assert load.sent == outgoing - kept


def test_decompose_and_reload_are_equal_to_the_last_bit(tmp_path: Any) -> None:
    run = make_run(tmp_path, {"name": "osft"}, "mixtral")
    engine = run.engine
    matrices = find_hidden_matrices(run.layout)
    layout = build_subspace_layout(matrices, engine.weights.shards, engine.ranks)
    assert layout == SubspaceLayout(
        tuple(matrices), {m.name: (0,) for m in matrices}, dict.fromkeys((m.name for m in matrices), 0)
    )
    before = {name: value.detach().clone() for name, value in engine.parameters.items()}
    subspaces = FrozenSubspaces.decompose(engine, layout, RATIO)
    for matrix in matrices:
        assert torch.equal(pick(dict(engine.parameters), matrix), pick(before, matrix))
        projector = subspaces.projectors[matrix.name]
        sizes = PlannedSubspaces.plan(MatrixSize(0, 0, matrix.num_rows, matrix.num_columns, ""), RATIO)
        assert projector.num_bytes == sizes.num_bytes
        update = torch.randn(1, matrix.numel)
        frozen = leading_directions(pick(before, matrix).double(), RATIO)
        expected = project_out(update.view(matrix.num_rows, -1).double(), *frozen)
        torch.testing.assert_close(
            projector.project(update).view_as(expected).double(), expected, rtol=1e-3, atol=1e-3, msg=matrix.name
        )
    state = subspaces.state_dict().owned
    assert FrozenSubspaces.load_state_dict(engine, layout, _Saved({})) is None  # type: ignore[arg-type]
    loaded = FrozenSubspaces.load_state_dict(engine, layout, _Saved(state))  # type: ignore[arg-type]
    assert loaded is not None and loaded.projectors.keys() == subspaces.projectors.keys()
    for name, projector in subspaces.projectors.items():
        for side in ("left", "right"):
            mine, theirs = (getattr(values, side) for values in (loaded.projectors[name], projector))
            assert torch.equal(mine.basis, theirs.basis) and torch.equal(mine.gains, theirs.gains)
            assert mine.tail == theirs.tail


class _Saved:
    """The part of a saved state that is read."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def owned_names(self) -> list[str]:
        return sorted(self._tensors)

    def owned(self, names: Any) -> dict[str, torch.Tensor]:
        return {name: self._tensors[name] for name in names}
