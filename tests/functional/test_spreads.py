"""How units lie along an axis, against loops, and the sizes that do not divide."""

from __future__ import annotations

import pytest

from das_ds.functional.spreads import SPREADS, Axis

HEADS, KEY_VALUE, WIDTH, EXPERTS, OWN = 6, 2, 5, 3, 4


def by_loops(name: str) -> tuple[Axis, list[set[int]]]:
    """An axis and the owners of each of its entries, spelled out."""
    sharers = [{3 * g, 3 * g + 1, 3 * g + 2} for g in range(KEY_VALUE)]
    query = [{head} for head in range(HEADS) for _ in range(WIDTH)]
    shared = [sharers[g] for g in range(KEY_VALUE) for _ in range(WIDTH)]
    if name == "evenly":
        return Axis(2, HEADS * WIDTH, HEADS, HEADS), query * 2
    if name == "halves":
        return Axis(1, 2 * HEADS * WIDTH, HEADS, HEADS), query * 2
    if name == "key_value":
        return Axis(1, KEY_VALUE * WIDTH, HEADS, KEY_VALUE), shared
    if name == "query_key_value":
        return Axis(1, (HEADS + 2 * KEY_VALUE) * WIDTH, HEADS, KEY_VALUE), query + shared * 2
    own = [[{expert * OWN + unit} for unit in range(OWN)] for expert in range(EXPERTS)]
    if name == "experts":
        return Axis(EXPERTS, OWN, EXPERTS * OWN, 1), [unit for expert in own for unit in expert]
    return Axis(EXPERTS, 2 * OWN, EXPERTS * OWN, 1), [unit for expert in own for unit in expert * 2]


@pytest.mark.parametrize("name", SPREADS)
def test_every_entry_has_its_owners(name: str) -> None:
    axis, expected = by_loops(name)
    found = SPREADS[name](axis)
    assert found.shape[0] == axis.num_blocks * axis.size == len(expected)
    assert [{unit for unit in owners if unit >= 0} for owners in found.tolist()] == expected


@pytest.mark.parametrize(
    ("name", "axis", "message"),
    [
        ("evenly", Axis(1, 25, 6, 6), "25 entries, which is no multiple of 6 units"),
        ("halves", Axis(1, 25, 5, 5), "25 entries, which is no multiple of 2 halves"),
        ("halves", Axis(1, 26, 6, 6), "13 entries, which is no multiple of 6 units"),
        ("key_value", Axis(1, 25, 6, 2), "25 entries, which is no multiple of 2 key/value heads"),
        ("key_value", Axis(1, 24, 6, 4), "6 entries, which is no multiple of 4 key/value heads"),
        ("query_key_value", Axis(1, 25, 6, 2), "25 entries, which is no multiple of 10 query, key and value heads"),
        ("experts", Axis(4, 8, 30, 1), "30 entries, which is no multiple of 4 experts"),
        ("expert_halves", Axis(3, 9, 12, 1), "9 entries, which is no multiple of 2 halves"),
    ],
)
def test_sizes_that_do_not_divide_are_named(name: str, axis: Axis, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SPREADS[name](axis)
