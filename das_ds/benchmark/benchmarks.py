"""The benchmarks of a config, read and checked completely before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from das_ds.benchmark.items import Item, read_items
from das_ds.benchmark.request_files import find_requests_folder, read_requests
from das_ds.config import BenchmarksConfig, ScoringRule
from das_ds.data.sources import fingerprint
from das_ds.errors import ConfigError, DataError

FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz")


@dataclass(frozen=True)
class Benchmark:
    """A task and its items."""

    name: str
    items: Sequence[Item]
    rule: ScoringRule
    """By which it is reported."""
    settings: dict[str, Any]
    """Everything but model and rule that affects its scores: fingerprint of its file, number of items."""

    @cached_property
    def is_cloze(self) -> bool:
        """Whether no item has anything to choose from: then an item is right if each token is the most probable one."""
        return all(len(item.continuations) == 1 for item in self.items)

    @property
    def chance(self) -> float:
        """Expected accuracy of guessing, the mean of 1 / K; 0 for a cloze."""
        return 0.0 if self.is_cloze else sum(1 / len(item.continuations) for item in self.items) / len(self.items)

    @property
    def guessing(self) -> float:
        """Mean of 1 / (K - 1), which `rules.adjust_transitions` needs; 0 for a cloze."""
        return 0.0 if self.is_cloze else sum(1 / (len(i.continuations) - 1) for i in self.items) / len(self.items)


def read_benchmarks(config: BenchmarksConfig) -> list[Benchmark]:
    """All benchmarks of a config, in its order.

    Raises:
        ConfigError: none, two of one name, or request files that cannot be found.
        DataError: a file that is missing or damaged, or an item that is not as expected.
    """
    if not config.tasks:
        raise ConfigError(
            "benchmarks.tasks: found none, expected at least one task of request files, such as arc_easy/rc_0shot, or "
            "file of items"
        )
    names = [_benchmark_name(task) for task in config.tasks]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"benchmarks.tasks: names must differ, found more than once: {', '.join(repeated)}")
    benchmarks = []
    for name, task in zip(names, config.tasks, strict=True):
        if _is_file(task):
            path = Path(task)
            items = read_items(path)
            own_rule: ScoringRule = "acc"
        else:
            path, items, own_rule = read_requests(find_requests_folder(config.data), task)
        items = items[: config.max_items]
        if len({len(item.continuations) == 1 for item in items}) > 1:
            raise DataError(f"{path}: found items with one choice and items with several, expected one kind")
        settings = {"file": fingerprint(path), "items": len(items)}
        benchmarks.append(Benchmark(name, items, config.rule or own_rule, settings))
    return benchmarks


def _is_file(task: str) -> bool:
    return task.lower().endswith(FILE_SUFFIXES)


def _benchmark_name(task: str) -> str:
    """Name in tables: of request files their folders, of a file its name without endings."""
    return Path(task).name.split(".jsonl")[0] if _is_file(task) else task.strip("/")
