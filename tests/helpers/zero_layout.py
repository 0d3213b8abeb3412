"""Which elements of which parameters a rank owns, by arithmetic alone, as DeepSpeed 0.19.8 divides them."""

from __future__ import annotations


def owned(sizes: dict[str, tuple[int, bool]], stage: int, rank: int, world_size: int) -> list[tuple[str, int, int]]:
    """(name, first element, elements) of one rank at stages 1 to 3.

    Args:
        sizes: name -> (elements, whether it is a matrix), in order.
        stage: ZeRO stage.
        rank, world_size: which of how many.
    """
    if stage == 3:
        parts = {name: -(-numel // world_size) for name, (numel, _) in sizes.items()}
        found = [(name, rank * part, min(part, sizes[name][0] - rank * part)) for name, part in parts.items()]
        return [shard for shard in found if shard[2] > 0]
    shards = []
    for is_matrix in (True, False):
        group = {name: numel for name, (numel, kind) in sizes.items() if kind == is_matrix}
        # Every rank's part begins at a multiple of two elements.
        part = -(-sum(group.values()) // (2 * world_size)) * 2
        position = 0
        for name, numel in group.items():
            first = max(0, rank * part - position)
            end = min(numel, (rank + 1) * part - position)
            if end > first:
                shards.append((name, first, end - first))
            position += numel
    return shards
