"""Merging by moments of every kind of matrix on one rank, against the formula on matrices written out."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from das_ds.softmask.direction import DirectionImportance
from das_ds.softmask.input_layout import build_input_layout
from das_ds.softmask.linear_inputs import find_masked_matrices
from das_ds.softmask.moment_merge import merge_by_moments
from helpers.fake_run import make_run

NUM_EARLIER = 2
NUM_TOKENS = 90
"""Of 100."""


def random_moment(width: int, seed: int) -> torch.Tensor:
    vectors = torch.randn(3 * width, width, generator=torch.Generator().manual_seed(seed))
    return vectors.T @ vectors / len(vectors)


def merged(run: Any, num_tokens: int | None) -> tuple[Any, Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(M, A, weights before, weights after the domain) of a merge into the run's weights."""
    inputs = build_input_layout(find_masked_matrices(run), run.engine.weights.shards, run.engine.ranks)
    sums: list[DirectionImportance] = []
    for first in (0, 1000):
        moments: dict[str, torch.Tensor | None] = {
            name: random_moment(width, first + number) for number, (name, width) in enumerate(inputs.widths.items())
        }
        sums.append(DirectionImportance(run, inputs, moments, num_tokens))
    old = {name: value.detach().clone() for name, value in run.engine.parameters.items()}
    before = {value: value.detach().flatten().clone() for value in run.engine.parameters.values()}
    generator = torch.Generator().manual_seed(1)
    for value in run.engine.parameters.values():
        value.data += 0.1 * torch.randn(value.shape, generator=generator)
    new = {name: value.detach().clone() for name, value in run.engine.parameters.items()}
    run.engine.weights.writable_flats = nullcontext
    merge_by_moments(run, before, *sums, num_earlier=NUM_EARLIER, off_diagonal=0.9)
    return *sums, old, new


def pick(weight: torch.Tensor, matrix: Any) -> torch.Tensor:
    """The matrix (o, d) of a parameter as it is stored: one of several experts, or transposed."""
    if weight.ndim == 3 and matrix.name.endswith("]"):
        return weight[int(matrix.name.rpartition("[")[2][:-1])]
    return weight.T if matrix.transposed else weight


@pytest.mark.parametrize("num_tokens", [None, NUM_TOKENS])
@pytest.mark.parametrize("model_type", ["roberta", "gpt2", "mixtral"])
def test_merge_of_matrices_and_of_all_else_is_the_formula(
    model_type: str, num_tokens: int | None, tmp_path: Path
) -> None:
    run = make_run(tmp_path, {"name": "regmean"}, model_type)
    earlier, latest, old, new = merged(run, num_tokens)
    with_matrix = set()
    for matrix in find_masked_matrices(run):
        with_matrix.add(matrix.parameter)
        factors = torch.full((matrix.width, matrix.width), 0.9).fill_diagonal_(1.0).double()
        m, a = (x.moments[matrix.input].double() * factors for x in (earlier, latest))
        w_old, w = (pick(weights[matrix.parameter], matrix).double() for weights in (old, new))
        expected = (w_old @ m + w @ a) @ torch.linalg.inv(m + a)
        found = pick(run.engine.parameters[matrix.parameter].detach(), matrix)
        if num_tokens is not None and matrix.parameter in run.layout.vocabulary:
            assert found[num_tokens:].equal(pick(new[matrix.parameter], matrix)[num_tokens:])
            found, expected = found[:num_tokens], expected[:num_tokens]
        torch.testing.assert_close(found.double(), expected, rtol=0.0, atol=1e-5)
    others = run.engine.parameters.keys() - with_matrix
    assert any("norm" in name.lower() or "ln_" in name for name in others)
    for name in others:
        found = run.engine.parameters[name].detach()
        expected = (NUM_EARLIER * old[name] + new[name]) / (NUM_EARLIER + 1)
        if num_tokens is not None and name in run.layout.vocabulary:
            assert found[num_tokens:].equal(new[name][num_tokens:])
            found, expected = found[:num_tokens], expected[:num_tokens]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    kinds = {(new[matrix.parameter].ndim, matrix.transposed) for matrix in find_masked_matrices(run)}
    assert (
        kinds
        == {"roberta": {(2, False)}, "gpt2": {(2, False), (2, True)}, "mixtral": {(2, False), (3, False)}}[model_type]
    )
