"""Forgetting and transfer, against values computed by hand and plain loops over random matrices."""

from __future__ import annotations

import math

import pytest
import torch

from das_ds.reporting import transfer

# Three domains and a general corpus: forgetting 0.7 and 0.2, drift 0.4, forward transfer (0.5 - 0.3) / 2.
BY_HAND = torch.tensor(
    [
        [6.0, 5.0, 4.0, 3.0],
        [4.0, 4.5, 4.1, 3.1],
        [4.6, 2.0, 4.3, 3.2],
        [4.7, 2.2, 1.0, 3.4],
    ],
    dtype=torch.float64,
)
IN_ORDER = torch.tensor([1, 2, 3, 0])


def averages(matrix: torch.Tensor, learned: torch.Tensor) -> tuple[float | None, float | None]:
    forgotten = transfer.forgetting(matrix, learned)
    helped = transfer.forward_transfer(matrix, learned)
    return (
        transfer.average(forgotten, learned, transfer.has_forgetting(matrix, learned)),
        transfer.average(helped, learned, transfer.has_forward_transfer(matrix, learned)),
    )


def test_transfer_worked_example() -> None:
    assert transfer.forgetting(BY_HAND, IN_ORDER).tolist() == pytest.approx([0.7, 0.2, math.nan, math.nan], nan_ok=True)
    assert transfer.drift(BY_HAND, IN_ORDER).tolist() == pytest.approx([math.nan] * 3 + [0.4], nan_ok=True)
    assert averages(BY_HAND, IN_ORDER) == pytest.approx((0.45, (0.5 - 0.3) / 2))


def test_transfer_scores_flip_every_sign() -> None:
    for number in (transfer.forgetting, transfer.forward_transfer, transfer.drift):
        scores = number(-BY_HAND, IN_ORDER, higher_is_better=True)
        torch.testing.assert_close(scores, number(BY_HAND, IN_ORDER), equal_nan=True)


def test_transfer_single_stage_counts_nothing() -> None:
    matrix = BY_HAND[:2]
    learned = torch.tensor([1, 1, 1, 0])
    assert (
        not transfer.has_forgetting(matrix, learned).any() and not transfer.has_forward_transfer(matrix, learned).any()
    )
    assert averages(matrix, learned) == (None, None)


def test_average_two_tasks_of_a_domain_count_once() -> None:
    """0.3 and 0.5 in the first domain, 0.1 in the second: the mean is that of 0.4 and 0.1."""
    scores = torch.tensor([[0.0, 0.0, 0.0], [0.8, 0.9, 0.0], [0.0, 0.0, 0.7], [0.5, 0.4, 0.6]], dtype=torch.float64)
    learned = torch.tensor([1, 1, 2])
    forgotten = transfer.forgetting(scores, learned, higher_is_better=True)
    assert forgotten.tolist() == pytest.approx([0.3, 0.5, 0.1])
    counted = transfer.has_forgetting(scores, learned)
    assert transfer.average(forgotten, learned, counted) == pytest.approx(0.25)


@pytest.mark.parametrize(("row", "column"), [(1, 0), (3, 0), (2, 1), (3, 1)])
def test_forgetting_not_measured_is_nan_and_has_no_mean(row: int, column: int) -> None:
    matrix = BY_HAND.clone()
    matrix[row, column] = math.nan
    forgotten = transfer.forgetting(matrix, IN_ORDER)
    assert forgotten[column].isnan() and not forgotten[1 - column].isnan()
    assert averages(matrix, IN_ORDER)[0] is None


@pytest.mark.parametrize("num_domains", [1, 2, 4])
@pytest.mark.parametrize("num_general", [0, 1, 2])
@pytest.mark.parametrize("num_missing_rows", [0, 1, 3])
def test_transfer_any_matrix_equals_plain_loops(num_domains: int, num_general: int, num_missing_rows: int) -> None:
    done = max(num_domains - num_missing_rows, 0)
    generator = torch.Generator().manual_seed(num_domains)
    matrix = torch.rand(done + 1, num_domains + num_general, generator=generator, dtype=torch.float64)
    learned = torch.tensor([*range(1, num_domains + 1), *[0] * num_general])
    rows = matrix.tolist()
    forgotten = [rows[done][i] - rows[i + 1][i] for i in range(num_domains) if i + 1 < done]
    helped = [rows[0][i] - rows[i][i] for i in range(1, num_domains) if i <= done]
    drift = [rows[done][num_domains + g] - rows[0][num_domains + g] for g in range(num_general)]
    found = transfer.forgetting(matrix, learned)
    assert found[transfer.has_forgetting(matrix, learned)].tolist() == pytest.approx(forgotten)
    assert found.isnan().sum() == len(found) - len(forgotten)
    assert transfer.drift(matrix, learned)[num_domains:].tolist() == pytest.approx(drift)
    assert averages(matrix, learned) == pytest.approx(
        tuple(sum(values) / len(values) if values else None for values in (forgotten, helped))
    )


@pytest.mark.parametrize("shape", [(0, 2), (2, 1), (2, 3)])
def test_transfer_shape_mismatch_is_an_assertion_error(shape: tuple[int, int]) -> None:
    for number in (transfer.has_forgetting, transfer.has_forward_transfer):
        with pytest.raises(AssertionError, match=r"a matrix of shape|for . columns"):
            number(torch.zeros(shape), torch.tensor([1, 2]))
