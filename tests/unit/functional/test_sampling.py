"""Order, subsets and corruption: closed forms, counts and independence of the call order."""

import numpy as np
import pytest
import torch

from das_ds.functional.sampling import SampleOrder, epoch_order, mlm_corrupt, sample_generator, subset_indices


def test_generator_depends_on_seed_stream_and_index_only() -> None:
    def draws(seed: int, stream: str, index: int) -> list[float]:
        return [float(draw) for draw in sample_generator(seed, stream, index).random(4)]

    first = draws(0, "a", 5)
    others = [draws(1, "a", 5), draws(0, "b", 5), draws(0, "a", 6)]
    assert draws(0, "a", 5) == first
    assert not any(set(first) & set(other) for other in others)


def test_generator_long_draws_do_not_overlap() -> None:
    first, second = (sample_generator(0, "a", index).random(10_000) for index in (7, 8))
    assert not set(first) & set(second)


def test_epoch_order_is_a_permutation_that_changes_with_the_epoch() -> None:
    orders = [epoch_order(97, 3, "train/a", epoch) for epoch in range(3)]
    assert all(sorted(order.tolist()) == list(range(97)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert not orders[0].flags.writeable


def test_sample_order_walks_through_the_epochs() -> None:
    expected = [index for epoch in range(3) for index in epoch_order(5, 0, "s", epoch)]
    order = SampleOrder(5, 0, "s")
    assert [order[number] for number in range(15)] == expected
    assert order[2] == expected[2]


@pytest.mark.parametrize(("num_blocks", "num_samples", "size"), [(50, 10, 10), (10, 50, 10), (1, 1, 1)])
def test_subset_is_sorted_and_without_repeats(num_blocks: int, num_samples: int, size: int) -> None:
    chosen = subset_indices(num_blocks, num_samples, seed=0)
    assert len(chosen) == size
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(range(num_blocks))
    assert chosen == subset_indices(num_blocks, num_samples, seed=0)


def test_subset_covers_all_blocks_evenly() -> None:
    counts = np.zeros(20)
    for seed in range(2000):
        counts[subset_indices(20, 5, seed)] += 1
    # Each count is binomial with mean 500 and deviation 19.4.
    assert np.abs(counts - 500).max() < 5 * 19.4


def test_corruption_of_each_kind_by_hand() -> None:
    input_ids = torch.tensor([10, 11, 12, 13, 14, 15])
    corrupted, predicted = mlm_corrupt(
        input_ids,
        special_mask=torch.tensor([False, False, False, False, False, True]),
        selection=torch.tensor([0.1, 0.1, 0.1, 0.1, 0.15, 0.0]),
        treatment=torch.tensor([0.79, 0.8, 0.89, 0.91, 0.0, 0.0]),
        replacements=torch.tensor([20, 21, 22, 23, 24, 25]),
        mask_id=4,
        probability=0.15,
    )
    assert corrupted.tolist() == [4, 21, 22, 13, 14, 15]
    assert predicted.tolist() == [True, True, True, True, False, False]
