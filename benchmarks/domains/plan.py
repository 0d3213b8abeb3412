"""Data classes of the benchmark: tiers, suites (a base model over an order of domains), and variants of methods."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from das_ds.config import parse_method
from das_ds.methods.directions import DirectionsConfig
from das_ds.methods.ewc import EwcConfig
from das_ds.methods.soft_masked import SoftMaskedConfig

BaseName = Literal["encoder", "decoder"]
Values = dict[str, Any]
"""Nested keys of a run config."""

NAIVE = "ncl"
"""Label of naive training, the baseline."""
LR_SEARCH_DOMAINS = 2
"""Number of first domains on which learning rates are chosen."""


@dataclass(frozen=True)
class Variant:
    """One method with its settings."""

    label: str
    overrides: Values
    """Keys of the run config in which it differs from the tier's settings; the learning rate is searched."""
    rate_scale: float = 1.0
    """Factor of the tier's candidate learning rates, so that every variant has equally many candidates."""
    is_compared: bool = True
    """Whether it is run over all domains; otherwise only in the learning-rate search, on the first two."""


@dataclass(frozen=True)
class Suite:
    """One base model over one order of domains, whose runs are compared with each other."""

    name: str
    base: BaseName
    domains: tuple[str, ...]


@dataclass(frozen=True)
class Tier:
    """A benchmark of one size."""

    name: str
    suites: tuple[Suite, ...]
    settings: Values
    """Keys of the run config that all runs share."""
    num_samples: int
    """Sequences on which a method measures after each domain, if it does."""
    learning_rates: tuple[float, ...]
    """Candidates in ascending order."""
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    lr_search_seed: int
    """Seed of the learning-rate search, not one of `seeds`."""
    sweep_factors: tuple[float, ...]
    """Multiples of its chosen rate at which naive training is also run: the baseline sweep, which learns less."""
    matched: tuple[str, ...]
    """Variants to which naive training is matched, see `lr_matching.py`."""
    repeated: str
    """Variant whose first run is made twice, to check that results are reproducible."""
    threads: int
    """CPU threads per run; the order of summation depends on it."""
    contenders: tuple[str, ...] = ()
    """Variants that are also run with `more_seeds`. They form the families of tests, fixed here before anything is run:
    each of them compared with the baseline sweep, and the matched ones with the others."""
    more_seeds: tuple[int, ...] = ()
    """Additional seeds of the contenders and of naive training."""
    parallel: int = 1
    """Runs at a time."""
    tolerance: float = 0.01
    """Nats by which a matched loss after learning domains 2..T may differ."""
    max_probes: int = 4
    """Learning rates to try for each match."""
    task_seeds: int = 0
    """Fine-tuning seeds of each end task; 0: no end tasks."""
    task_variants: tuple[str, ...] = ()
    """Variants whose models are fine-tuned on the end tasks."""
    pretraining: dict[BaseName, Values] = field(default_factory=dict)
    """Base model -> keys of the run that pre-trains it on the general corpus."""

    @property
    def recorded_settings(self) -> Values:
        """The settings, with the size of the sample."""
        return {**self.settings, "num_samples": self.num_samples}

    @property
    def corpora(self) -> list[str]:
        """Domains of all suites, without repeats."""
        return list(dict.fromkeys(domain for suite in self.suites for domain in suite.domains))

    @property
    def bases(self) -> list[BaseName]:
        """Base models of all suites, without repeats."""
        return list(dict.fromkeys(suite.base for suite in self.suites))

    @property
    def compared(self) -> list[Variant]:
        """Variants that are run over all domains."""
        return [variant for variant in self.variants if variant.is_compared]

    def variant(self, label: str) -> Variant:
        """The variant with this label."""
        return next(variant for variant in self.variants if variant.label == label)

    def run_seeds(self, label: str) -> tuple[int, ...]:
        """Seeds of a variant's runs."""
        return self.seeds + (self.more_seeds if label in (NAIVE, *self.contenders) else ())

    def rates(self, variant: Variant) -> list[float]:
        """Candidate learning rates of a variant."""
        return [rate * variant.rate_scale for rate in self.learning_rates]


def sampling(method: Values, num_samples: int) -> Values:
    """Keys of the section `method` that give the size of the sample, where the method has one."""
    match parse_method(method):
        case SoftMaskedConfig():
            return {"importance": {"num_samples": num_samples}}
        case EwcConfig() | DirectionsConfig():
            return {"num_samples": num_samples}
        case _:
            return {}


def merge_values(first: Values, *others: Values) -> Values:
    """Merge nested keys, later values over earlier ones; lists are replaced, not joined."""
    result = dict(first)
    for other in others:
        for key, value in other.items():
            are_sections = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merge_values(result[key], value) if are_sections else value
    return result
