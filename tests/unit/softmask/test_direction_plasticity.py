"""What masks of directions leave of an input: sums by blocks, by batches, in pieces, and in closed form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from das_ds.data.batch import Batch
from das_ds.distributed.resumable import ResumableLoop
from das_ds.errors import TrainingError
from das_ds.functional.directions import build_projector
from das_ds.functional.projectors import Projector
from das_ds.softmask import direction_plasticity
from das_ds.softmask.direction_plasticity import add_energies_, everything_open, measure_plasticity, measure_protected
from das_ds.softmask.input_layout import InputLayout, build_input_layout
from das_ds.softmask.linear_inputs import find_masked_matrices
from das_ds.softmask.plasticity import InputPlasticity
from helpers.fake_run import make_run
from helpers.plasticity import random_moment
from helpers.training import LENGTH, random_batch, rank_part

METHOD = {"name": "directions"}


def prepare(folder: Path, model_type: str = "roberta", **changes: Any) -> tuple[Any, InputLayout, dict[str, Projector]]:
    run = make_run(folder, METHOD, model_type, **changes)
    inputs = build_input_layout(find_masked_matrices(run), run.engine.weights.shards, run.engine.ranks)
    projectors: dict[str, Projector] = {
        name: build_projector(random_moment(name, width, 0), 0.5, "full") for name, width in inputs.widths.items()
    }
    return run, inputs, projectors


def passing(found: dict[str, InputPlasticity]) -> dict[str, float]:
    return {name: input_.passing for name, input_ in found.items() if input_.passing is not None}


@pytest.mark.parametrize("rank", ["full", 3])
@pytest.mark.parametrize("block_bytes", [1, 4 * 12 * 4, 1 << 20])
def test_add_energies_equals_float64(rank: Any, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direction_plasticity, "BLOCK_BYTES", block_bytes)
    projector = build_projector(random_moment("x", 12, 0), 0.5, rank)
    exact = projector.project(torch.eye(12, dtype=torch.float64))
    x = torch.randn(10, 12)
    weights = torch.rand(10)
    for given in (None, weights):
        total = torch.tensor([1.0, 2.0], dtype=torch.float64)
        add_energies_(total, projector, x, given)
        w = torch.ones(10) if given is None else given
        expected = [
            1 + sum(w[i].double() * x[i].double().square().sum() for i in range(10)),
            2 + sum(w[i].double() * (x[i].double() @ exact).square().sum() for i in range(10)),
        ]
        torch.testing.assert_close(total, torch.stack(expected), rtol=1e-5, atol=0.0)


def test_add_energies_of_no_vectors_changes_nothing() -> None:
    total = torch.zeros(2, dtype=torch.float64)
    add_energies_(total, build_projector(torch.eye(4), 1.0, "full"), torch.zeros(0, 4), None)
    assert total.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("model_type", ["roberta", "deberta-v2", "mixtral"])
def test_measure_plasticity_does_not_depend_on_batches(model_type: str, tmp_path: Path) -> None:
    """Also not where layers read a table, or tokens that are routed to them."""
    run, inputs, projectors = prepare(tmp_path, model_type)
    batch = random_batch(4, 1)
    at_once = measure_plasticity(run, inputs, projectors, ResumableLoop([batch]))
    parts = [rank_part(batch, number, 4) for number in range(4)]
    found = measure_plasticity(run, inputs, projectors, ResumableLoop(parts))
    assert passing(found) == pytest.approx(passing(at_once), rel=1e-4)


def test_measure_plasticity_counts_tables_once(tmp_path: Path) -> None:
    """DeBERTa's keys read hidden states and relative positions: by hand, from what they are given."""
    run, inputs, projectors = prepare(tmp_path, "deberta-v2", position_buckets=LENGTH // 2)
    model = run.network.model
    batch = random_batch(2, 1)
    found = measure_plasticity(run, inputs, projectors, ResumableLoop([rank_part(batch, n, 2) for n in range(2)]))
    table = model.base_model.encoder.get_rel_embedding()
    hidden = model.base_model(batch.corrupted_ids, output_hidden_states=True).hidden_states[0]
    name = next(matrix.input for matrix in inputs.matrices if "layer.0.attention.self.query_proj" in matrix.name)
    x = torch.cat((hidden.flatten(0, 1), table)).detach()
    expected = projectors[name].project(x.double()).square().sum() / x.double().square().sum()
    assert found[name].passing == pytest.approx(expected.item(), rel=1e-4)


def test_measure_plasticity_ignores_rows_that_fill_a_batch(tmp_path: Path) -> None:
    run, inputs, projectors = prepare(tmp_path)
    whole = random_batch(4, 1)
    first = rank_part(whole, 0, 2)
    kept = whole.predicted < 2 * LENGTH
    filled = Batch(
        whole.input_ids,
        whole.corrupted_ids,
        whole.predicted[kept],
        whole.targets[kept],
        torch.tensor([1.0, 1.0, 0.0, 0.0]),
    )
    found, expected = (measure_plasticity(run, inputs, projectors, ResumableLoop([b])) for b in (filled, first))
    assert passing(found) == pytest.approx(passing(expected), rel=1e-4)


def test_measure_plasticity_continues_with_its_sums(tmp_path: Path) -> None:
    run, inputs, projectors = prepare(tmp_path)
    batches = [random_batch(2, seed) for seed in range(3)]
    complete = measure_plasticity(run, inputs, projectors, ResumableLoop(batches))
    start = ResumableLoop(batches[:2])
    measure_plasticity(run, inputs, projectors, start)
    rest = ResumableLoop(batches)
    rest.num_done = 2
    rest.accumulators = dict(start.accumulators)
    assert measure_plasticity(run, inputs, projectors, rest) == complete


def test_measure_plasticity_without_text_is_the_trace_only(tmp_path: Path) -> None:
    run, inputs, projectors = prepare(tmp_path)
    for name, found in measure_plasticity(run, inputs, projectors, None).items():
        assert found.passing is None and found.width == inputs.widths[name]
        assert found.plasticity == pytest.approx(projectors[name].trace / found.width)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_measure_plasticity_non_finite_input_is_error(value: float, tmp_path: Path) -> None:
    run, inputs, projectors = prepare(tmp_path)
    run.network.model.roberta.encoder.layer[0].output.LayerNorm.bias.data[3] = value
    with pytest.raises(TrainingError, match=r"plasticity: found an input of roberta\.\S+ that is not finite, expected"):
        measure_plasticity(run, inputs, projectors, ResumableLoop([random_batch(2, 1)]))


def test_measure_protected_equals_trace_formula(tmp_path: Path) -> None:
    run, inputs, projectors = prepare(tmp_path)
    moments = {name: random_moment(name, width, 1) for name, width in inputs.widths.items()}
    unused = next(iter(moments))
    moments[unused] = torch.zeros_like(moments[unused])
    found = measure_protected(run, inputs, projectors.items(), moments)
    for name, moment in moments.items():
        if name == unused:
            assert found[name].passing is None
            continue
        exact = projectors[name].project(torch.eye(len(moment)).double())
        expected = (exact @ moment.double() @ exact).trace() / moment.double().trace()
        assert found[name].passing == pytest.approx(expected.item(), rel=1e-5)


def test_everything_open_is_one_for_every_input(tmp_path: Path) -> None:
    _, inputs, _ = prepare(tmp_path)
    found = everything_open(inputs)
    assert found == {name: InputPlasticity(width, 1.0, 1.0) for name, width in inputs.widths.items()}
