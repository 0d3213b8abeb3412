"""Spreads against loops over the parts that a parameter is made of."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from das_ds.functional.axis_layouts import NOBODY, SPREADS, Axis

HEADS, KEY_VALUE_HEADS, WIDTH, EXPERTS, OWN = 6, 2, 3, 4, 5


def sharers(head: int) -> list[int]:
    """Query heads of a key/value head: as many in a row as there are query heads to each."""
    return [query for query in range(HEADS) if query * KEY_VALUE_HEADS // HEADS == head]


def evenly() -> list[list[int]]:
    return [[unit] for _ in range(EXPERTS) for unit in range(HEADS) for _ in range(WIDTH)]


def halves() -> list[list[int]]:
    return [[unit] for _ in range(EXPERTS) for _ in ("gate", "up") for unit in range(HEADS) for _ in range(WIDTH)]


def key_value() -> list[list[int]]:
    return [sharers(head) for head in range(KEY_VALUE_HEADS) for _ in range(WIDTH)]


def query_key_value() -> list[list[int]]:
    queries = [[head] for head in range(HEADS) for _ in range(WIDTH)]
    return queries + 2 * key_value()


def experts() -> list[list[int]]:
    return [[OWN * expert + unit] for expert in range(EXPERTS) for unit in range(OWN) for _ in range(WIDTH)]


def expert_halves() -> list[list[int]]:
    return [
        [OWN * expert + unit]
        for expert in range(EXPERTS)
        for _ in ("gate", "up")
        for unit in range(OWN)
        for _ in range(WIDTH)
    ]


CASES: dict[str, tuple[Callable[[], list[list[int]]], Axis]] = {
    "evenly": (evenly, Axis(EXPERTS, HEADS * WIDTH, HEADS, HEADS)),
    "halves": (halves, Axis(EXPERTS, 2 * HEADS * WIDTH, HEADS, HEADS)),
    "key_value": (key_value, Axis(1, KEY_VALUE_HEADS * WIDTH, HEADS, KEY_VALUE_HEADS)),
    "query_key_value": (query_key_value, Axis(1, (HEADS + 2 * KEY_VALUE_HEADS) * WIDTH, HEADS, KEY_VALUE_HEADS)),
    "experts": (experts, Axis(EXPERTS, OWN * WIDTH, EXPERTS * OWN, EXPERTS * OWN)),
    "expert_halves": (expert_halves, Axis(EXPERTS, 2 * OWN * WIDTH, EXPERTS * OWN, EXPERTS * OWN)),
}


def test_every_spread_is_checked() -> None:
    assert CASES.keys() == SPREADS.keys()


@pytest.mark.parametrize("name", CASES)
def test_spread_equals_a_loop_over_the_parts(name: str) -> None:
    expected, axis = CASES[name]
    found = SPREADS[name](axis)
    assert found.dtype == torch.int64
    assert len(found) == axis.num_blocks * axis.size
    assert [[owner for owner in owners if owner != NOBODY] for owners in found.tolist()] == expected()


def test_as_many_key_value_heads_as_heads_share_nothing() -> None:
    axis = Axis(1, HEADS * WIDTH, HEADS, HEADS)
    assert torch.equal(SPREADS["key_value"](axis), SPREADS["evenly"](axis))


@pytest.mark.parametrize(
    ("name", "axis", "message"),
    [
        ("evenly", Axis(1, 19, 6, 6), "19 entries, which is no multiple of 6 units"),
        ("evenly", Axis(1, 19, 0, 0), "19 entries, which is no multiple of 0 units"),
        ("halves", Axis(1, 13, 6, 6), "13 entries, which is no multiple of 2 halves"),
        ("halves", Axis(1, 14, 6, 6), "7 entries, which is no multiple of 6 units"),
        ("key_value", Axis(1, 12, 6, 4), "6 entries, which is no multiple of 4 key/value heads"),
        ("key_value", Axis(1, 13, 6, 2), "13 entries, which is no multiple of 2 key/value heads"),
        ("query_key_value", Axis(1, 31, 6, 2), "31 entries, which is no multiple of 10 query, key and value heads"),
        ("query_key_value", Axis(1, 30, 6, 4), "6 entries, which is no multiple of 4 key/value heads"),
        ("experts", Axis(3, 10, 20, 20), "20 entries, which is no multiple of 3 experts"),
        ("experts", Axis(4, 11, 20, 20), "11 entries, which is no multiple of 5 units"),
        ("expert_halves", Axis(3, 10, 20, 20), "20 entries, which is no multiple of 3 experts"),
        ("expert_halves", Axis(4, 11, 20, 20), "11 entries, which is no multiple of 2 halves"),
        ("expert_halves", Axis(4, 12, 20, 20), "6 entries, which is no multiple of 5 units"),
    ],
)
def test_sizes_that_do_not_divide_are_an_error(name: str, axis: Axis, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        SPREADS[name](axis)
