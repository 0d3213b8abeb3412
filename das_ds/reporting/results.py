"""The model of results.json: the loss matrix of a run, its forgetting and transfer; typed and versioned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from das_ds.checkpoint.manifest import DomainEnd, DomainEvaluation
from das_ds.config.stage import stage_name
from das_ds.errors import TrainingError
from das_ds.functional.losses import bits_per_byte
from das_ds.reporting import transfer
from das_ds.storage import Section, VersionedJson
from das_ds.versions import library_versions

FORMAT_VERSION: Literal[3] = 3

BEFORE_TRAINING = "before training"

LossRow = Sequence[float | None]
"""Losses of a stage; None: not measured."""


class Forgetting(Section):
    """Loss now minus loss right after learning; see `reporting.transfer.forgetting`."""

    average: float | None
    """Mean over the domains learned before the last stage; null if there are none, or one is no longer evaluated."""
    per_domain: dict[str, float]
    """One value per such domain that is still evaluated."""


class LoadedWeights(Section):
    """How the pretrained weights were loaded; the same at every ZeRO stage."""

    source: str
    """Folder or hub name."""
    files: list[str]
    """Files that were read."""
    dtypes: list[str]
    """Data types in the files; weights are converted to float32."""
    num_tensors: int
    """Tensors that were read."""
    renamed: int
    """Weights that have another name in the files."""
    converted: int
    """Weights built from several tensors, or from a slice of one."""
    surplus: list[str]
    """Tensors that the model does not use."""
    drawn: list[str]
    """Weights of the LM head that are in no file and were initialized randomly (`model.allow_missing`)."""


class Results(VersionedJson):
    """Evaluation results of a run; losses in nats per predicted token."""

    what: ClassVar[str] = "the results of a run"
    format_version: Literal[3] = FORMAT_VERSION
    """Version of this format."""
    complete: bool
    """Whether every domain has been learned; until then all values refer to the last row."""
    method: str
    """Name of the continual-learning method."""
    domains: list[str] = Field(min_length=1)
    """Domains in training order."""
    learned: list[list[str]]
    """Domains of each stage: one per stage, or several at once (`pool`)."""
    eval_domains: list[str]
    """Columns of the loss matrix: the domains, the general corpus if there is one, then other corpora."""
    loss_matrix: list[list[float | None]] = Field(min_length=1)
    """Held-out loss: row 0 before training, row t after stage t; one column per evaluated corpus; null: not measured,
    where a run continues another one of which a model or the text of a domain is gone."""
    forgetting: Forgetting
    general_drift: float | None
    """Loss on the general corpus now minus before training; null without such a corpus."""
    drift: dict[str, float | None] = Field(default_factory=dict)
    """The same for each of the other corpora that are only evaluated; null: not measured before training."""
    backward_transfer: float | None
    """Effect of later domains on earlier ones; positive is better; null until a second stage is learned."""
    forward_transfer: float | None
    """Effect of earlier domains on later ones before these are learned; positive is better; null if undefined."""
    tokens_seen: int
    """Training tokens of all domains and ranks."""
    wall_seconds: float
    """Duration of the run, summed over all its starts."""
    world_size: int
    """Number of ranks."""
    zero_stage: int
    """ZeRO stage of the engine."""
    versions: dict[str, str]
    """Versions of Python and of the libraries that results depend on."""
    weights: LoadedWeights | None = None
    """Where the weights came from; null for random weights, and in files of older versions."""
    tokens_per_byte: dict[str, float] | None = None
    """Corpus -> tokens per UTF-8 byte of its evaluated text; null in masked language modeling, where the loss of some
    tokens, given all others, is no code length of the text; and in files of older versions."""
    evaluations: list[DomainEvaluation] = Field(default=[])
    """Evaluations within domains, from the start of each; empty without `evaluation.every_steps`."""
    ends: list[DomainEnd] = Field(default=[])
    """How the domains so far ended; empty without `evaluation.every_steps`."""
    base_divergences: list[float | None] = Field(default=[])
    """KL(base || model) in nats per predicted token on the held-out text of each stage so far, right after it, the base
    being the model before the first; empty without `evaluation.base_divergence`, null where it was not measured."""

    @model_validator(mode="after")
    def _matrix_fits_names(self) -> Results:
        num_domains = len(self.domains)
        num_columns = len(self.eval_domains)
        others = self.eval_domains[num_domains:]
        num_general = 0 if self.general_drift is None else 1
        if self.eval_domains[:num_domains] != self.domains or others[num_general:] != list(self.drift):
            raise ValueError(
                "eval_domains must be the domains in order, at most one general corpus, and those of drift"
            )
        if [domain for stage in self.learned for domain in stage] != self.domains or not all(self.learned):
            raise ValueError("learned must have every domain in order, in stages of at least one")
        max_rows = len(self.learned) + 1
        if len(self.loss_matrix) > max_rows or any(len(row) != num_columns for row in self.loss_matrix):
            raise ValueError(f"loss_matrix must have at most {max_rows} rows of {num_columns} numbers")
        return self

    @property
    def all_stages(self) -> list[str]:
        """Row names of the loss matrix of the complete run."""
        return [BEFORE_TRAINING, *(f"after {stage_name(stage)}" for stage in self.learned)]

    @property
    def stages(self) -> list[str]:
        """Row names of the loss matrix so far."""
        return self.all_stages[: len(self.loss_matrix)]

    @property
    def rows_learned(self) -> dict[str, int]:
        """Domain -> row right after learning it, which may not exist yet."""
        return {domain: row for row, stage in enumerate(self.learned, start=1) for domain in stage}

    @property
    def losses_learned(self) -> dict[str, float]:
        """Domain -> loss right after learning it, for the domains learned so far."""
        return {
            domain: measured(self.loss_matrix[row][column])
            for column, (domain, row) in enumerate(self.rows_learned.items())
            if row < len(self.loss_matrix)
        }

    @property
    def last_losses(self) -> dict[str, float]:
        """Corpus -> loss after the last stage so far, of all corpora that are still evaluated."""
        pairs = zip(self.eval_domains, self.loss_matrix[-1], strict=True)
        return {corpus: loss for corpus, loss in pairs if loss is not None}

    @property
    def table(self) -> tuple[list[str], list[list[float | str]]]:
        """Column names, and rows of the loss matrix with their names, for a tracker's `log_table`."""
        named = zip(self.stages, transfer.to_matrix(self.loss_matrix).tolist(), strict=True)
        return ["stage", *self.eval_domains], [[stage, *losses] for stage, losses in named]

    @property
    def bits_per_byte(self) -> list[list[float | None]] | None:
        """The loss matrix in bits per byte (`functional.losses.bits_per_byte`); None without `tokens_per_byte`."""
        if self.tokens_per_byte is None:
            return None
        ratios = [self.tokens_per_byte[corpus] for corpus in self.eval_domains]
        return [
            [None if loss is None else bits_per_byte(loss, ratio) for loss, ratio in zip(row, ratios, strict=True)]
            for row in self.loss_matrix
        ]

    @property
    def divergence_of_stages(self) -> dict[str, float]:
        """Stage -> its entry of `base_divergences`, of those that were measured."""
        names = [stage_name(domains) for domains in self.learned[: len(self.base_divergences)]]
        pairs = zip(names, self.base_divergences, strict=True)
        return {name: value for name, value in pairs if value is not None}

    @property
    def summary(self) -> dict[str, float]:
        """The metrics by which runs are compared, for a tracker's `log_summary`."""
        metrics = {
            "forgetting/average": self.forgetting.average,
            **{f"forgetting/{domain}": value for domain, value in self.forgetting.per_domain.items()},
            "backward_transfer": self.backward_transfer,
            "forward_transfer": self.forward_transfer,
            "general_drift": self.general_drift,
            **{f"drift/{corpus}": value for corpus, value in self.drift.items()},
            **{f"base_divergence/{stage}": value for stage, value in self.divergence_of_stages.items()},
        }
        return {name: value for name, value in metrics.items() if value is not None}


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
    others: Sequence[str] = (),
    weights: dict[str, Any] | None = None,
    tokens_per_byte: dict[str, float] | None = None,
    evaluations: Sequence[DomainEvaluation] = (),
    ends: Sequence[DomainEnd] = (),
    base_divergences: Sequence[float | None] = (),
) -> Results:
    """Compute the results of a run from the rows of its loss matrix so far.

    Args:
        method, domains, eval_domains, tokens_seen, wall_seconds, world_size, zero_stage: see `Results`.
        loss_matrix: one row per evaluation, the first before training.
        learned: domains of each stage; None: one domain per stage.
        others: corpora that are only evaluated, beside the general corpus.
        weights: see `LoadedWeights`; None: random weights.
        tokens_per_byte, evaluations, ends, base_divergences: see `Results`.

    Raises:
        TrainingError: a loss is not finite.
    """
    _check_finite(loss_matrix, eval_domains)
    stages = [list(stage) for stage in learned] if learned is not None else [[domain] for domain in domains]
    losses = transfer.to_matrix(loss_matrix)
    rows = learned_rows(eval_domains, stages)
    forgetting = transfer.forgetting(losses, rows)
    changes = transfer.drift(losses, rows).tolist()
    drift = {
        corpus: None if math.isnan(change) else change for corpus, change in zip(eval_domains, changes, strict=True)
    }
    has_forgetting = transfer.has_forgetting(losses, rows)
    average_forgetting = transfer.average(forgetting, rows, has_forgetting)
    average_forward_transfer = transfer.average(
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
            average=average_forgetting,
            per_domain={
                domain: value
                for domain, value, counts in zip(eval_domains, forgetting.tolist(), has_forgetting, strict=True)
                if counts and not math.isnan(value)
            },
        ),
        general_drift=next((drift[corpus] for corpus in eval_domains[len(domains) :] if corpus not in others), None),
        drift={corpus: drift[corpus] for corpus in others},
        # Subtracting from 0 avoids -0.0.
        backward_transfer=None if average_forgetting is None else 0.0 - average_forgetting,
        forward_transfer=average_forward_transfer,
        tokens_seen=tokens_seen,
        wall_seconds=wall_seconds,
        world_size=world_size,
        zero_stage=zero_stage,
        versions=library_versions(),
        weights=None if weights is None else LoadedWeights.model_validate(weights),
        tokens_per_byte=tokens_per_byte,
        evaluations=list(evaluations),
        base_divergences=list(base_divergences),
        ends=list(ends),
    )


def measured(loss: float | None) -> float:
    """A loss that is always there, as that of a domain right after it was learned."""
    assert loss is not None, "every domain is evaluated when it was learned"
    return loss


def learned_rows(columns: Sequence[str | None], stages: Sequence[Sequence[str]]) -> torch.Tensor:
    """For each column, the row right after learning its domain, 0 for no domain; (C,) int64, as `transfer` takes it."""
    rows = {domain: row for row, stage in enumerate(stages, start=1) for domain in stage}
    return torch.tensor([0 if column is None else rows.get(column, 0) for column in columns], dtype=torch.int64)


def _check_finite(loss_matrix: Sequence[LossRow], eval_domains: Sequence[str]) -> None:
    for num_learned, row in enumerate(loss_matrix):
        for corpus, loss in zip(eval_domains, row, strict=True):
            if loss is not None and not math.isfinite(loss):
                raise TrainingError(
                    f"held-out loss of {corpus} after {num_learned} domains: found {loss}, expected a finite number; "
                    "lower train.learning_rate or train in fp32"
                )
