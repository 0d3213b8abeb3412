"""Transfer numbers against sums written out by hand and against plain loops over random matrices."""

from __future__ import annotations

import pytest
import torch

from das_ds.functional.transfer import backward_transfer, forgetting, forward_transfer, general_drift

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


def test_by_hand() -> None:
    torch.testing.assert_close(forgetting(BY_HAND, 3), torch.tensor([0.7, 0.2], dtype=torch.float64))
    torch.testing.assert_close(general_drift(BY_HAND, 3), torch.tensor([0.4], dtype=torch.float64))
    assert backward_transfer(BY_HAND, 3) == pytest.approx(-0.45)
    assert forward_transfer(BY_HAND, 3) == pytest.approx((0.5 - 0.3) / 2)


@pytest.mark.parametrize("num_domains", [1, 2, 4])
@pytest.mark.parametrize("num_general", [0, 1, 2])
@pytest.mark.parametrize("num_missing_rows", [0, 1, 3])
def test_loops_agree_on_whole_and_partial_matrices(num_domains: int, num_general: int, num_missing_rows: int) -> None:
    learned = max(num_domains - num_missing_rows, 0)
    generator = torch.Generator().manual_seed(num_domains)
    matrix = torch.rand(learned + 1, num_domains + num_general, generator=generator, dtype=torch.float64)
    rows = matrix.tolist()
    forgotten = [rows[learned][i] - rows[i + 1][i] for i in range(num_domains) if i + 1 < learned]
    helped = [rows[0][i] - rows[i][i] for i in range(1, num_domains) if i <= learned]
    drift = [rows[learned][num_domains + g] - rows[0][num_domains + g] for g in range(num_general)]
    assert forgetting(matrix, num_domains).tolist() == pytest.approx(forgotten)
    assert general_drift(matrix, num_domains).tolist() == pytest.approx(drift)
    assert backward_transfer(matrix, num_domains) == pytest.approx(-sum(forgotten) / max(len(forgotten), 1))
    assert forward_transfer(matrix, num_domains) == pytest.approx(sum(helped) / max(len(helped), 1))


@pytest.mark.parametrize("shape", [(0, 2), (4, 2), (2, 1)])
def test_a_matrix_that_does_not_fit_the_domains_is_a_bug(shape: tuple[int, int]) -> None:
    for number in (forgetting, backward_transfer, forward_transfer, general_drift):
        with pytest.raises(AssertionError, match="for 2 domains"):
            number(torch.zeros(shape), 2)
