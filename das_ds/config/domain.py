"""Domains: corpora, or mixtures of them, that a run learns, with the settings in which each differs from the others."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, ClassVar, get_args

from pydantic import Field, model_validator

from das_ds.config.data import CorpusConfig, SourceConfig
from das_ds.config.section import Section
from das_ds.config.train import LRSchedulerName

MAX_PERIOD = 100_000
"""Largest number of samples after which the order of a domain's sources may repeat; it is kept as a table."""
SCHEDULE_KEYS = ("learning_rate", "lr_scheduler", "warmup_ratio", "decay_ratio", "min_lr_ratio")
"""Keys of `train` that a domain may have for itself."""


class DomainReplayConfig(Section):
    """Earlier text in the global batches of one domain."""

    fraction: float | None = Field(default=None, ge=0.0, lt=1.0)
    """`method.replay.fraction` of this domain; null: that of the run."""


class DomainConfig(CorpusConfig):
    """A corpus, or a mixture of several, that the model is pre-trained on, with settings of its own."""

    largest: ClassVar[dict[str, int]] = {"tokens": 10**15}

    sources: list[SourceConfig] = Field(default=[])
    """In place of `train`: corpora that are mixed in the proportions of their weights, in every part of the domain."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; null, with `epochs` and `tokens`: `train.steps_per_domain`."""
    epochs: float | None = Field(default=None, gt=0.0)
    """In place of `steps`: passes over the training blocks (of all sources together), rounded up to complete steps;
    replayed text is not counted."""
    tokens: int | None = Field(default=None, ge=1)
    """In place of `steps`: tokens trained on, rounded up to complete steps."""
    learning_rate: float | None = Field(default=None, gt=0.0)
    """`train.learning_rate` of this domain; null, as for the next four: that of the run."""
    lr_scheduler: LRSchedulerName | None = None
    """`train.lr_scheduler` of this domain; `infinite` is one schedule for all domains and allowed in `train` only."""
    warmup_ratio: float | None = Field(default=None, ge=0.0, lt=1.0)
    """`train.warmup_ratio` of this domain."""
    decay_ratio: float | None = Field(default=None, ge=0.0, le=1.0)
    """`train.decay_ratio` of this domain."""
    min_lr_ratio: float | None = Field(default=None, ge=0.0, le=1.0)
    """`train.min_lr_ratio` of this domain."""
    replay: DomainReplayConfig = DomainReplayConfig()

    @property
    def training_sources(self) -> list[SourceConfig]:
        """Where training samples come from: `train` as one source, or `sources` with all their names and columns."""
        return [
            source.model_copy(
                update={"name": source.name or f"source{number}", "text_column": source.text_column or self.text_column}
            )
            for number, source in enumerate(self.sources)
        ] or super().training_sources

    @property
    def source_weights(self) -> tuple[int, ...]:
        """The smallest integers in the proportions of the sources' weights, which are taken as written in decimals."""
        exact = [Fraction(str(source.weight)) for source in self.training_sources]
        denominator = math.lcm(*(weight.denominator for weight in exact))
        integers = [int(weight * denominator) for weight in exact]
        divisor = math.gcd(*integers)
        return tuple(integer // divisor for integer in integers)

    @property
    def schedule(self) -> dict[str, Any]:
        """Keys of `train` that this domain sets -> their values."""
        return {key: value for key in SCHEDULE_KEYS if (value := getattr(self, key)) is not None}

    @model_validator(mode="after")
    def _has_train(self) -> DomainConfig:
        if not self.training_text:
            raise ValueError("a domain needs train text")
        if self.train and self.sources:
            raise ValueError("found train and sources, allowed: one of the two")
        return self

    @model_validator(mode="after")
    def _has_one_length(self) -> DomainConfig:
        given = [key for key in ("steps", "epochs", "tokens") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"found {' and '.join(given)}, allowed: one of steps, epochs and tokens")
        return self

    @model_validator(mode="after")
    def _stream_has_no_epochs(self) -> DomainConfig:
        if self.is_streamed and self.epochs is not None:
            raise ValueError(
                f"epochs: found {self.epochs:g} with streaming, where the number of blocks is unknown; allowed: "
                "steps or tokens"
            )
        return self

    @model_validator(mode="after")
    def _schedule_is_its_own(self) -> DomainConfig:
        if self.lr_scheduler == "infinite":
            raise ValueError(
                "lr_scheduler: found infinite, one schedule for all domains; allowed in a domain: "
                f"{', '.join(name for name in get_args(LRSchedulerName) if name != 'infinite')}; or set "
                "train.lr_scheduler"
            )
        return self

    @model_validator(mode="after")
    def _sources_fit_together(self) -> DomainConfig:
        names = [source.name for source in self.training_sources]
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise ValueError(f"sources: names must differ, found more than once: {repeated}")
        if sum(self.source_weights) > MAX_PERIOD:
            weights = [source.weight for source in self.sources]
            nearest = ", ".join(f"{max(weight / sum(weights), 1e-3):.3f}" for weight in weights)
            raise ValueError(
                f"sources: found weights {', '.join(map(str, weights))}, allowed: proportions of integers with a sum "
                f"of at most {MAX_PERIOD}, such as {nearest}"
            )
        return self
