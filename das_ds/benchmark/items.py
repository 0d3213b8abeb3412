"""Items of benchmarks, and the format of one's own files: JSON lines (.jsonl, also .gz, .xz) with an object per item,

    {"context": "Question: Which is a mammal?\\nAnswer:", "choices": ["whale", "shark"], "answer": 0}

`answer` is the position of the right choice, counted from 0. A choice is appended to the context after one space,
except where the context is empty or ends in white space, or the choice begins with it. With a single choice the item is
a cloze. Other keys are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from das_ds.data.corpus import check_unicode, parse_json_object, read_lines
from das_ds.errors import DataError


@dataclass(frozen=True, slots=True)
class Item:
    """A question: K contexts, each with a continuation, of which one is right."""

    contexts: tuple[str, ...]
    """In most benchmarks K times the same."""
    continuations: tuple[str, ...]
    """The choices, as they follow their contexts: most begin with a space."""
    answer: int
    """Position of the right one."""


def read_items(path: Path) -> list[Item]:
    """The items of a file of one's own.

    Raises:
        DataError: a file that is missing, damaged or empty, or an item that lacks something.
    """
    items = [_parse_item(row, location) for row, location in read_rows(path)]
    if not items:
        raise DataError(f"{path}: found no item, expected one object per line")
    return items


def read_rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a file of JSON lines, each with its location for messages.

    Raises:
        DataError: the file cannot be read, or a line is no object.
    """
    num_lines = 0
    for lines, _ in read_lines(path):
        for number, line in enumerate(lines, num_lines + 1):
            if line.strip():
                location = f"{path}, line {number}"
                yield parse_json_object(line, location), location
        num_lines += len(lines)


def _parse_item(row: dict[str, Any], location: str) -> Item:
    if missing := [key for key in ("context", "choices", "answer") if key not in row]:
        raise DataError(
            f"{location}: found no {missing[0]}, expected context, choices and answer; found {', '.join(row)}"
        )
    context = row["context"]
    if not isinstance(context, str):
        raise DataError(f"{location}: context: found {type(context).__name__}, expected text")
    choices = row["choices"]
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c.strip() for c in choices):
        raise DataError(f"{location}: choices: found {choices!r}, expected a list of at least one text, none empty")
    answer = row["answer"]
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise DataError(f"{location}: answer: found {answer!r}, allowed: an integer from 0 to {len(choices) - 1}")
    for key, text in (("context", context), *(("choices", choice) for choice in choices)):
        check_unicode(text, f"{location}: {key}")
    continuations = tuple(_separator(context, choice) + choice for choice in choices)
    return Item((context,) * len(choices), continuations, answer)


def _separator(context: str, choice: str) -> str:
    return "" if not context or context[-1].isspace() or choice[0].isspace() else " "
