"""End tasks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from das_ds.config.section import NAME_PATTERN, PathText, Section


class TaskConfig(Section):
    """A task with labels, which exported models are fine-tuned on; `das-ds finetune` alone reads it."""

    name: str = Field(pattern=NAME_PATTERN)
    """Name in tables and files (letters, digits, - and _)."""
    domain: str | None = None
    """Domain whose end task this is, for forgetting and transfer; null: the one that the name begins with, as in
    `acl_arc` and `acl`, else none."""
    train: PathText
    """Training rows: a .jsonl file (also .gz, .xz), one object per line."""
    dev: PathText
    """Rows that choose the best epoch, in the same form."""
    test: PathText
    """Rows that are scored at the best epoch only, in the same form."""
    kind: Literal["text", "pair", "entities"] = "text"
    """One text; two texts, such as an aspect and a sentence; one text with marked entities."""
    text_column: str = "text"
    """Column of the text."""
    pair_column: str = "aspect"
    """Kind `pair`: column of what stands before the text."""
    label_column: str = "label"
    """Column of the label, a text or a whole number."""
    labels: list[str] = Field(default=[])
    """Classes, each with rows in train; empty: the labels of train."""
    markers: list[str] = Field(default=["[[", "]]", "<<", ">>"], min_length=1)
    """Kind `entities`: what stands around the entities of every text; each becomes one token."""
    metric: Literal["accuracy", "macro_f1", "micro_f1"] = "macro_f1"
    """The score that is reported and that chooses the best epoch."""
    epochs: int = Field(default=10, ge=1)
    """Passes over train at most."""
    patience: int = Field(default=3, ge=1)
    """Epochs without a better dev score after which training stops."""
    learning_rate: float = Field(default=3e-5, gt=0.0)
    """Peak learning rate; it rises over `warmup_ratio` of all steps, then falls linearly to 0."""
    warmup_ratio: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the steps of all epochs over which the learning rate rises from 0."""
    weight_decay: float = Field(default=0.01, ge=0.0)
    """Decoupled weight decay of matrices."""
    batch_size: int = Field(default=16, ge=1)
    """Rows per optimizer step."""
    sequence_length: int = Field(default=128, ge=8)
    """Tokens per row at most; longer rows are cut at their end."""
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(default=[0, 1, 2, 3, 4], min_length=1)
    """One training each: seed of the classifier's weights, the order of rows and dropout."""

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
