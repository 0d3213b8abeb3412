"""Position of a shard in its flat tensor, its parameter, and a chunk."""

import torch

from das_ds.distributed.state import Shard


def test_shard_slices_give_its_elements() -> None:
    flat = torch.arange(20.0)
    shard = Shard("w", flat, flat_start=5, param_start=2, numel=4)
    assert shard.values.tolist() == flat[shard.span].tolist() == [5.0, 6.0, 7.0, 8.0]
    assert torch.arange(10)[shard.param_span].tolist() == [2, 3, 4, 5]
    chunk = slice(3, 12)
    assert flat[chunk][shard.within(chunk)].tolist() == shard.values.tolist()
    shard.values.zero_()
    assert not flat[5:9].any()
