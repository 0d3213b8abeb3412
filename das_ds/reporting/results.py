"""results.json: the matrix of held-out losses of a run and what follows from it, typed and versioned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from das_ds.config.stage import stage_name
from das_ds.errors import TrainingError
from das_ds.reporting import transfer
from das_ds.storage import Section, VersionedJson
from das_ds.versions import library_versions

FORMAT_VERSION: Literal[3] = 3

BEFORE_TRAINING = "before training"

LossRow = Sequence[float]


class Forgetting(Section):
    """Loss now minus loss right after learning; see `reporting.transfer.forgetting`."""

    average: float | None
    """Mean over the domains that a later stage could make the model forget; null where there is none."""
    per_domain: dict[str, float]
    """One number per such domain."""


class LoadedWeights(Section):
    """What was done with the files that the network was read from; the same at every ZeRO stage."""

    source: str
    """Folder or hub name."""
    files: list[str]
    """Files that were read."""
    dtypes: list[str]
    """Types of what was read; it became float32."""
    num_tensors: int
    """Tensors that were read."""
    renamed: int
    """Weights with another name in the files."""
    converted: int
    """Weights that were made of several tensors, or of a part of one."""
    surplus: list[str]
    """Tensors that the network has no place for."""
    drawn: list[str]
    """Weights of the LM head that no file has, drawn by the seed (`model.allow_missing`)."""


class Results(VersionedJson):
    """Everything a run has to say about its evaluation; losses in nats per predicted token."""

    what: ClassVar[str] = "the results of a run"
    format_version: Literal[3] = FORMAT_VERSION
    """Version of this format."""
    complete: bool
    """Whether every domain has been learned; until then all numbers refer to the last row."""
    method: str
    """Name of the continual-learning method."""
    domains: list[str] = Field(min_length=1)
    """Domains in the order of learning."""
    learned: list[list[str]]
    """What each stage of the run learns: one domain after another, or several at once (`pool`)."""
    eval_domains: list[str]
    """Column names of the loss matrix: the domains, then the general corpus where there is one."""
    loss_matrix: list[list[float]] = Field(min_length=1)
    """Held-out loss: row 0 before any training, row t after stage t; one column per evaluated corpus."""
    forgetting: Forgetting
    general_drift: float | None
    """Loss on the general corpus now minus before training; null without such a corpus."""
    backward_transfer: float | None
    """What later domains did for earlier ones; positive is good; null where no domain comes after one learned."""
    forward_transfer: float | None
    """What earlier domains did for later ones before these were learned; positive is good; null likewise."""
    tokens_seen: int
    """Tokens trained on, over all domains and ranks."""
    wall_seconds: float
    """Time of the run, all its parts together where it was resumed."""
    world_size: int
    """Number of ranks."""
    zero_stage: int
    """ZeRO stage of the engine."""
    versions: dict[str, str]
    """Versions of Python and of the libraries that decide the numbers."""
    weights: LoadedWeights | None = None
    """What the network was read from; null for random weights, and in results of versions that did not say it."""

    @model_validator(mode="after")
    def _matrix_fits_names(self) -> Results:
        num_domains, num_columns = len(self.domains), len(self.eval_domains)
        if self.eval_domains[:num_domains] != self.domains or num_columns > num_domains + 1:
            raise ValueError("eval_domains must be the domains in order and at most one general corpus")
        if [domain for stage in self.learned for domain in stage] != self.domains or not all(self.learned):
            raise ValueError("learned must have every domain in order, in stages of at least one")
        most = len(self.learned) + 1
        if len(self.loss_matrix) > most or any(len(row) != num_columns for row in self.loss_matrix):
            raise ValueError(f"loss_matrix must have at most {most} rows of {num_columns} numbers")
        return self

    @property
    def all_stages(self) -> list[str]:
        """Row names of the loss matrix of the whole run."""
        return [BEFORE_TRAINING, *(f"after {stage_name(stage)}" for stage in self.learned)]

    @property
    def stages(self) -> list[str]:
        """Row names of the loss matrix so far."""
        return self.all_stages[: len(self.loss_matrix)]

    @property
    def rows_learned(self) -> dict[str, int]:
        """Domain -> row right after learning it, which may not be there yet."""
        return {domain: row for row, stage in enumerate(self.learned, start=1) for domain in stage}

    @property
    def losses_learned(self) -> dict[str, float]:
        """Domain learned so far -> loss right after learning it."""
        return {
            domain: self.loss_matrix[row][column]
            for column, (domain, row) in enumerate(self.rows_learned.items())
            if row < len(self.loss_matrix)
        }

    @property
    def table(self) -> tuple[list[str], list[list[float | str]]]:
        """Column names and rows of the loss matrix with its row names, for a tracker's `log_table`."""
        named = zip(self.stages, self.loss_matrix, strict=True)
        return ["stage", *self.eval_domains], [[stage, *losses] for stage, losses in named]

    @property
    def summary(self) -> dict[str, float]:
        """The few numbers that compare runs, for a tracker's `log_summary`."""
        numbers = {
            "forgetting/average": self.forgetting.average,
            **{f"forgetting/{domain}": value for domain, value in self.forgetting.per_domain.items()},
            "backward_transfer": self.backward_transfer,
            "forward_transfer": self.forward_transfer,
            "general_drift": self.general_drift,
        }
        return {name: value for name, value in numbers.items() if value is not None}


def build_results(
    *,
    method: str,
    domains: Sequence[str],
    eval_domains: Sequence[str],
    loss_matrix: Sequence[LossRow],
    tokens_seen: int,
    wall_seconds: float,
    world_size: int,
    zero_stage: int,
    learned: Sequence[Sequence[str]] | None = None,
    weights: dict[str, Any] | None = None,
) -> Results:
    """Results of a run from the rows of its loss matrix so far.

    Args:
        learned: domains of each stage; None: one after another.
        weights: see `LoadedWeights`; None: random ones.

    Raises:
        TrainingError: a loss is not finite.
    """
    _check_finite(loss_matrix, eval_domains)
    stages = [list(stage) for stage in learned] if learned is not None else [[domain] for domain in domains]
    losses = torch.tensor(loss_matrix, dtype=torch.float64)
    rows = learned_rows(eval_domains, stages)
    forgotten, has_forgetting = transfer.forgetting(losses, rows), transfer.has_forgetting(losses, rows)
    average = transfer.average(forgotten, rows, has_forgetting)
    helped = transfer.average(
        transfer.forward_transfer(losses, rows), rows, transfer.has_forward_transfer(losses, rows)
    )
    return Results(
        complete=len(loss_matrix) == len(stages) + 1,
        method=method,
        domains=list(domains),
        learned=stages,
        eval_domains=list(eval_domains),
        loss_matrix=[list(row) for row in loss_matrix],
        forgetting=Forgetting(
            average=average,
            per_domain={
                domain: value
                for domain, value, counts in zip(eval_domains, forgotten.tolist(), has_forgetting, strict=True)
                if counts
            },
        ),
        general_drift=transfer.average(transfer.drift(losses, rows), rows, rows == 0),
        # Subtracting from 0 keeps nothing forgotten from being written as -0.0.
        backward_transfer=None if average is None else 0.0 - average,
        forward_transfer=helped,
        tokens_seen=tokens_seen,
        wall_seconds=wall_seconds,
        world_size=world_size,
        zero_stage=zero_stage,
        versions=library_versions(),
        weights=None if weights is None else LoadedWeights.model_validate(weights),
    )


def learned_rows(columns: Sequence[str | None], stages: Sequence[Sequence[str]]) -> torch.Tensor:
    """For every column's domain the row right after learning it, 0 for what is none; (C,) int64 for `transfer`."""
    rows = {domain: row for row, stage in enumerate(stages, start=1) for domain in stage}
    return torch.tensor([rows.get(column, 0) if column is not None else 0 for column in columns], dtype=torch.int64)


def _check_finite(loss_matrix: Sequence[LossRow], eval_domains: Sequence[str]) -> None:
    for num_learned, row in enumerate(loss_matrix):
        for corpus, loss in zip(eval_domains, row, strict=True):
            if not math.isfinite(loss):
                raise TrainingError(
                    f"held-out loss of {corpus} after {num_learned} domains: found {loss}, expected a finite number; "
                    "lower train.learning_rate or train in fp32"
                )
