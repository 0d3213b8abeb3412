"""Axis layouts against loops over the parts of a parameter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from das_ds.functional.axis_layouts import AXIS_LAYOUTS, NO_OWNER, Axis

HEADS = 6
KEY_VALUE_HEADS = 2
WIDTH = 3
EXPERTS = 4
OWN = 5


def sharers(head: int) -> list[int]:
    """Query heads of a key/value head: as many in a row as there are query heads to each."""
    return [query for query in range(HEADS) if query * KEY_VALUE_HEADS // HEADS == head]


def contiguous() -> list[list[int]]:
    return [[unit] for _ in range(EXPERTS) for unit in range(HEADS) for _ in range(WIDTH)]


def gate_up() -> list[list[int]]:
    return [[unit] for _ in range(EXPERTS) for _ in ("gate", "up") for unit in range(HEADS) for _ in range(WIDTH)]


def kv() -> list[list[int]]:
    return [sharers(head) for head in range(KEY_VALUE_HEADS) for _ in range(WIDTH)]


def qkv() -> list[list[int]]:
    queries = [[head] for head in range(HEADS) for _ in range(WIDTH)]
    return queries + 2 * kv()


def experts() -> list[list[int]]:
    return [[OWN * expert + unit] for expert in range(EXPERTS) for unit in range(OWN) for _ in range(WIDTH)]


def experts_gate_up() -> list[list[int]]:
    return [
        [OWN * expert + unit]
        for expert in range(EXPERTS)
        for _ in ("gate", "up")
        for unit in range(OWN)
        for _ in range(WIDTH)
    ]


CASES: dict[str, tuple[Callable[[], list[list[int]]], Axis]] = {
    "contiguous": (contiguous, Axis(EXPERTS, HEADS * WIDTH, HEADS, HEADS)),
    "gate_up": (gate_up, Axis(EXPERTS, 2 * HEADS * WIDTH, HEADS, HEADS)),
    "kv": (kv, Axis(1, KEY_VALUE_HEADS * WIDTH, HEADS, KEY_VALUE_HEADS)),
    "qkv": (qkv, Axis(1, (HEADS + 2 * KEY_VALUE_HEADS) * WIDTH, HEADS, KEY_VALUE_HEADS)),
    "experts": (experts, Axis(EXPERTS, OWN * WIDTH, EXPERTS * OWN, EXPERTS * OWN)),
    "experts_gate_up": (experts_gate_up, Axis(EXPERTS, 2 * OWN * WIDTH, EXPERTS * OWN, EXPERTS * OWN)),
}


def test_axis_layouts_cases_cover_all() -> None:
    assert CASES.keys() == AXIS_LAYOUTS.keys()


@pytest.mark.parametrize("name", CASES)
def test_axis_layout_equals_loop(name: str) -> None:
    expected, axis = CASES[name]
    found = AXIS_LAYOUTS[name](axis)
    assert found.dtype == torch.int64
    assert len(found) == axis.num_blocks * axis.size
    assert [[owner for owner in owners if owner != NO_OWNER] for owners in found.tolist()] == expected()


def test_kv_equal_head_counts_equals_contiguous() -> None:
    axis = Axis(1, HEADS * WIDTH, HEADS, HEADS)
    assert torch.equal(AXIS_LAYOUTS["kv"](axis), AXIS_LAYOUTS["contiguous"](axis))


@pytest.mark.parametrize(
    ("name", "axis", "message"),
    [
        ("contiguous", Axis(1, 19, 6, 6), "19 entries, which is no multiple of 6 units"),
        ("contiguous", Axis(1, 19, 0, 0), "19 entries, which is no multiple of 0 units"),
        ("gate_up", Axis(1, 13, 6, 6), "13 entries, which is no multiple of 2 gate and up projections"),
        ("gate_up", Axis(1, 14, 6, 6), "7 entries, which is no multiple of 6 units"),
        ("kv", Axis(1, 12, 6, 4), "6 entries, which is no multiple of 4 key/value heads"),
        ("kv", Axis(1, 13, 6, 2), "13 entries, which is no multiple of 2 key/value heads"),
        ("qkv", Axis(1, 31, 6, 2), "31 entries, which is no multiple of 10 query, key and value heads"),
        ("qkv", Axis(1, 30, 6, 4), "6 entries, which is no multiple of 4 key/value heads"),
        ("experts", Axis(3, 10, 20, 20), "20 entries, which is no multiple of 3 experts"),
        ("experts", Axis(4, 11, 20, 20), "11 entries, which is no multiple of 5 units"),
        ("experts_gate_up", Axis(3, 10, 20, 20), "20 entries, which is no multiple of 3 experts"),
        ("experts_gate_up", Axis(4, 11, 20, 20), "11 entries, which is no multiple of 2 gate and up projections"),
        ("experts_gate_up", Axis(4, 12, 20, 20), "6 entries, which is no multiple of 5 units"),
    ],
)
def test_axis_layout_sizes_not_divisible_raise(name: str, axis: Axis, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        AXIS_LAYOUTS[name](axis)
