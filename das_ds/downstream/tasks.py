"""End tasks: labeled rows of JSON files, read and checked completely before training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from das_ds.config import TaskConfig
from das_ds.data.corpus import check_unicode, parse_json_object, read_lines
from das_ds.data.sources import file_suffix, fingerprint
from das_ds.errors import ConfigError, DataError

MAX_LISTED = 5


@dataclass(frozen=True)
class Examples:
    """Rows of one file."""

    texts: list[str]
    pairs: list[str] | None
    """First texts of pairs, whose second texts are `texts`; None: no pairs."""
    labels: list[int]
    """Indices into the task's list of labels."""


@dataclass(frozen=True)
class EndTask:
    """A task and all its rows."""

    config: TaskConfig
    labels: list[str]
    """Classes in the order of their indices."""
    train: Examples
    dev: Examples
    test: Examples
    fingerprints: dict[str, str]
    """`train`, `dev` and `test` -> fingerprint of the file's content."""


@dataclass(frozen=True)
class _Row:
    text: str
    pair: str
    label: str


def select_tasks(tasks: Sequence[TaskConfig], names: Sequence[str]) -> list[TaskConfig]:
    """The tasks with these names, in the order of the config; all tasks if no name is given.

    Raises:
        ConfigError: an unknown name, or no tasks in the config.
    """
    if not tasks:
        raise ConfigError("tasks: found none, expected at least one with name, train, dev and test")
    known = [task.name for task in tasks]
    for name in names:
        if name not in known:
            raise ConfigError(f"--task {name}: no such task, allowed: {', '.join(known)}")
    return [task for task in tasks if not names or task.name in names]


def read_task(config: TaskConfig) -> EndTask:
    """Read a task's three files.

    Raises:
        DataError: a file that is missing, of another type, damaged or without rows; a row without a column, with an
            empty text or label, or an unmarked entity; a class without rows in train; a label that train lacks.
    """
    files = {"train": Path(config.train), "dev": Path(config.dev), "test": Path(config.test)}
    rows = {split: _read_rows(config, split, path) for split, path in files.items()}
    labels = config.labels or sorted({row.label for row in rows["train"]})
    _check_classes(config, labels, {row.label for row in rows["train"]})
    for split, path in files.items():
        _check_labels(config, labels, {row.label for row in rows[split]}, f"{split} ({path})")
    indices = {label: index for index, label in enumerate(labels)}
    examples = {
        split: Examples(
            texts=[row.text for row in split_rows],
            pairs=[row.pair for row in split_rows] if config.kind == "pair" else None,
            labels=[indices[row.label] for row in split_rows],
        )
        for split, split_rows in rows.items()
    }
    fingerprints = {split: fingerprint(path) for split, path in files.items()}
    return EndTask(config, labels, examples["train"], examples["dev"], examples["test"], fingerprints)


def _read_rows(config: TaskConfig, split: str, path: Path) -> list[_Row]:
    if not path.is_file():
        raise DataError(f"task {config.name}, {split}: {path}: found no such file; expected a .jsonl file")
    if not file_suffix(path).startswith(".jsonl"):
        raise DataError(
            f"task {config.name}, {split}: {path}: unknown file type; allowed are .jsonl, .jsonl.gz, .jsonl.xz"
        )
    rows = [_row(config, parse_json_object(line, location), location) for line, location in _placed_lines(path)]
    if not rows:
        raise DataError(f"task {config.name}, {split}: {path} has no rows; expected one object per line")
    return rows


def _placed_lines(path: Path) -> Iterator[tuple[str, str]]:
    num_lines = 0
    for lines, _ in read_lines(path):
        for number, line in enumerate(lines, num_lines + 1):
            if line.strip():
                yield line, f"{path}, line {number}"
        num_lines += len(lines)


def _row(config: TaskConfig, row: dict[str, Any], location: str) -> _Row:
    columns = {"text_column": config.text_column, "label_column": config.label_column}
    if config.kind == "pair":
        columns["pair_column"] = config.pair_column
    values = {key: _value(config, key, column, row, location) for key, column in columns.items()}
    text = values["text_column"]
    if config.kind == "entities":
        missing = [marker for marker in config.markers if marker not in text]
        if missing:
            raise DataError(
                f"{location}: found no {' '.join(missing)} in the text; task {config.name} is of kind entities, whose "
                f"texts have all of {' '.join(config.markers)} (tasks.markers)"
            )
    return _Row(text, values.get("pair_column", ""), values["label_column"])


def _value(config: TaskConfig, key: str, column: str, row: dict[str, Any], location: str) -> str:
    if column not in row:
        raise DataError(
            f"{location}: no column '{column}' (tasks.{key} of {config.name}); found columns: {', '.join(row)}"
        )
    value = row[column]
    if key == "label_column" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{location}: column '{column}' contains {value!r}; expected text that is not empty")
    check_unicode(value, f"{location}: column '{column}'")
    return value


def _check_classes(config: TaskConfig, labels: list[str], found: set[str]) -> None:
    empty = [label for label in labels if label not in found]
    if empty:
        raise DataError(
            f"task {config.name}: train ({config.train}) has no rows of {_abbreviate(empty)}; expected some"
        )
    if len(labels) < 2:
        raise DataError(f"task {config.name}: train ({config.train}) has one label only, {labels[0]}; expected two")


def _check_labels(config: TaskConfig, labels: list[str], found: set[str], location: str) -> None:
    unknown = sorted(found - set(labels))
    if unknown:
        allowed = "one of tasks.labels" if config.labels else "a label of train"
        raise DataError(
            f"task {config.name}: {location} has the label {_abbreviate(unknown)}; expected {allowed}: "
            f"{', '.join(labels)}"
        )


def _abbreviate(labels: list[str]) -> str:
    more = f" and {len(labels) - MAX_LISTED} more" if len(labels) > MAX_LISTED else ""
    return ", ".join(labels[:MAX_LISTED]) + more
