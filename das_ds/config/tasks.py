"""End tasks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from das_ds.config.section import NAME_PATTERN, PathText, Section


class TaskConfig(Section):
    """A labeled task for fine-tuning exported models; only `das-ds finetune` reads it."""

    name: str = Field(pattern=NAME_PATTERN)
    """Name in tables and files (letters, digits, - and _)."""
    domain: str | None = None
    """Domain of the task, for forgetting and transfer; null: the domain that begins its name, as in `acl_arc` and
    `acl`, else none."""
    train: PathText
    """Training rows: a .jsonl file (also .gz, .xz), one object per line."""
    dev: PathText
    """Rows for choosing the best epoch, in the same form."""
    test: PathText
    """Rows that are scored at the best epoch, in the same form."""
    kind: Literal["text", "pair", "entities"] = "text"
    """One text; two texts, such as an aspect and a sentence; one text with marked entities."""
    text_column: str = "text"
    """Column of the text."""
    pair_column: str = "aspect"
    """Kind `pair`: column of the first text."""
    label_column: str = "label"
    """Column of the label, a text or an integer."""
    labels: list[str] = Field(default=[])
    """Classes, each with rows in train; empty: the labels of train."""
    markers: list[str] = Field(default=["[[", "]]", "<<", ">>"], min_length=1)
    """Kind `entities`: markers around the entities of a text; each becomes one token."""
    metric: Literal["accuracy", "macro_f1", "micro_f1"] = "macro_f1"
    """Score that is reported and that chooses the best epoch."""
    epochs: int = Field(default=10, ge=1)
    """Maximum number of epochs over train."""
    patience: int = Field(default=3, ge=1)
    """Epochs without a better dev score before training stops."""
    learning_rate: float = Field(default=3e-5, gt=0.0)
    """Peak learning rate, after a linear warm-up over `warmup_ratio` of all steps; then it decays linearly to 0."""
    warmup_ratio: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Fraction of the steps of all epochs over which the learning rate rises from 0."""
    weight_decay: float = Field(default=0.01, ge=0.0)
    """Decoupled weight decay of matrices."""
    batch_size: int = Field(default=16, ge=1)
    """Rows per optimizer step."""
    sequence_length: int = Field(default=128, ge=8)
    """Maximum number of tokens per row; longer rows are truncated."""
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(default=[0, 1, 2, 3, 4], min_length=1)
    """Seeds of the classifier's weights, row order and dropout; one training each."""

    @model_validator(mode="after")
    def _lists_have_no_repeats(self) -> TaskConfig:
        for key in ("labels", "markers", "seeds"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise ValueError(f"{key}: found {values}, allowed: each once")
        return self

    @model_validator(mode="after")
    def _several_labels(self) -> TaskConfig:
        if len(self.labels) == 1 or "" in self.labels or "" in self.markers:
            raise ValueError(
                f"found labels {self.labels} and markers {self.markers}, allowed: no labels or at least two, none empty"
            )
        return self
