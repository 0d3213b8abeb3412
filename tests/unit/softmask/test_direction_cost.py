"""Counted costs of masks of directions, against what all ranks together have to do and what they are seen to send."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from das_ds.functional.projectors import DenseProjector
from das_ds.softmask.direction_cost import count_mask_cost
from helpers.direction_masks import (
    CUTS,
    MATRICES,
    cut_values,
    layouts_of,
    make_projectors,
    mask_gradients,
    masks_of,
    random_values,
    run_together,
)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("num_ranks", [1, 2, 7, 64])
def test_flop_of_all_ranks_are_those_of_every_vector_once(cut: str, num_ranks: int) -> None:
    projectors = make_projectors()
    costs = [
        count_mask_cost(layout, projectors, rank=rank, element_bytes=2)
        for rank, layout in enumerate(layouts_of(CUTS[cut](num_ranks)))
    ]
    expected = 0
    for matrix in MATRICES:
        is_dense = isinstance(projectors[matrix.input], DenseProjector)
        # The projectors of low rank have three directions.
        expected += matrix.numel * (2 * matrix.width if is_dense else 4 * 3)
    assert sum(cost.flop for cost in costs) == expected


def test_flop_and_products_are_those_of_a_run() -> None:
    projectors = make_projectors()
    shards_by_rank = CUTS["flat"](3)
    gradients = cut_values(shards_by_rank, random_values(1))
    costs = [
        count_mask_cost(mask.layout, projectors, rank=rank, element_bytes=4)
        for rank, mask in enumerate(masks_of(shards_by_rank, projectors))
    ]
    with FlopCounterMode(display=False) as counter:
        run_together(
            [
                mask.steps(own, torch._foreach_copy_)
                for mask, own in zip(masks_of(shards_by_rank, projectors), gradients, strict=True)
            ]
        )
    assert sum(cost.flop for cost in costs) == counter.get_total_flops()


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("num_ranks", [1, 2, 7, 64])
def test_sent_bytes_are_those_of_a_run(cut: str, num_ranks: int) -> None:
    _, volumes = mask_gradients(cut, num_ranks, random_values(1))
    for rank, layout in enumerate(layouts_of(CUTS[cut](num_ranks))):
        cost = count_mask_cost(layout, make_projectors(), rank=rank, element_bytes=4)
        sent = sum(int(volume[rank].sum() - volume[rank, rank]) for volume in volumes)
        peers = {peer for volume in volumes for peer in volume[rank].nonzero().flatten().tolist()} - {rank}
        assert cost.sent_bytes == 4 * sent
        assert cost.num_exchanges == len(volumes)
        assert cost.num_peers == len(peers)


def test_memory_of_one_rank_is_counted_by_product() -> None:
    projectors = make_projectors()
    cost = count_mask_cost(layouts_of(CUTS["flat"](1))[0], projectors, rank=0, element_bytes=2)
    numel = sum(matrix.numel for matrix in MATRICES)
    held = sum(projector.num_bytes for projector in projectors.values())
    # One product for each input.
    assert cost.num_products == len(projectors) and cost.projector_bytes == held
    assert cost.memory_bytes == 2 * 2 * numel + held
    hidden = (5 + 3 + 4) * 7
    assert cost.scratch_bytes == (4 + 4 + 2) * hidden
