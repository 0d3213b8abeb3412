"""Rules of style that no linter has, read from the syntax trees of the package, the benchmarks and the launchers."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def unrelated_tuple_assignments(source: str) -> Iterator[int]:
    """Lines that assign several values at once, as `a, b = 1, x()`.

    One call's several results, shapes and swaps are fine: their right side is no tuple, or has the names of the left.
    """
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
            continue
        targets = [target for target in node.targets if isinstance(target, ast.Tuple)]
        if not targets:
            continue
        left = {ast.unparse(element) for element in targets[0].elts}
        right = {ast.unparse(element) for element in node.value.elts}
        if not left & right:
            yield node.lineno


def test_no_line_assigns_unrelated_values() -> None:
    found = [
        f"{path.relative_to(REPOSITORY)}:{line}"
        for folder in ("das_ds", "benchmarks", "launch")
        for path in sorted((REPOSITORY / folder).rglob("*.py"))
        for line in unrelated_tuple_assignments(path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a, b = 1, 2", [1]),
        ("self.a, self.b = a, b", [1]),
        ("rows, columns = weight.shape", []),
        ("a, b = b, a", []),
        ("a, b = b, a + b", []),
        ("a = b = 1, 2", []),
        ("def f():\n    first, last = g(), h()", [2]),
    ],
)
def test_unrelated_tuple_assignment_is_found(source: str, expected: list[int]) -> None:
    assert list(unrelated_tuple_assignments(source)) == expected
