"""Data classes of the benchmark: tiers, suites (a base model over an order of domains), and variants of methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from das_ds.config import parse_method
from das_ds.methods.directions import DirectionsConfig
from das_ds.methods.ewc import EwcConfig
from das_ds.methods.regmean import RegMeanConfig
from das_ds.methods.soft_masked import SoftMaskedConfig

BaseName = Literal["encoder", "decoder"]
Values = dict[str, Any]
"""Nested keys of a run config."""

NAIVE = "ncl"
"""Label of naive training, the baseline."""
LR_SEARCH_DOMAINS = 2
"""Number of first domains on which learning rates and strengths are chosen."""


@dataclass(frozen=True)
class Variant:
    """One method with its settings."""

    label: str
    overrides: Values
    """Keys of the run config in which it differs from the tier's settings; the learning rate is searched."""
    rate_scale: float = 1.0
    """Factor of the tier's candidate learning rates, so that every variant has equally many candidates."""
    is_compared: bool = True
    """Whether it is run over all domains; otherwise only in the search, on the first two."""
    strength_of: str | None = None
    """Label of several strengths of one method, of which the best in the search is compared under this label."""

    @property
    def group(self) -> str:
        """Label under which it is compared, if it is."""
        return self.strength_of or self.label


@dataclass(frozen=True)
class Suite:
    """One base model over one order of domains, whose runs are compared with each other."""

    name: str
    base: BaseName
    domains: tuple[str, ...]
    steps: int | None = None
    """Steps per domain; None: those of the tier's settings."""


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
    """Candidates in ascending order, each twice the one before."""
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    """Of every variant; the first seed of all variants is run before the second of any."""
    lr_search_seed: int
    """Seed of the search, not one of `seeds`."""
    sweep_factors: tuple[float, ...]
    """Multiples of its chosen rate at which naive training is also run: the baseline sweep."""
    repeated: str
    """Variant whose first run is made twice, to check that results are reproducible."""
    threads: int
    """CPU threads per run; the order of summation depends on it."""
    lr_search_steps: int | None = None
    """Most steps per domain in the search; None: those of the runs."""
    max_extensions: int = 2
    """Further candidates on each side, tried while the best learning rate is the first or last one."""
    contenders: tuple[str, ...] = ()
    """Groups that are also run with `more_seeds`, and first. They are in the families of tests, fixed here and in
    `evidence/families.py` before anything is run."""
    against_naive: tuple[str, ...] = ()
    """Contenders that are tested against naive training at equal learning: the first family."""
    more_seeds: tuple[int, ...] = ()
    """Additional seeds of the contenders and of naive training."""
    parallel: int = 1
    """Runs at a time."""
    runs_of: str | None = None
    """Tier whose runs it shares, by the same settings; None: it has its own."""
    restores_groups: bool = True
    """Whether parameter groups are restored in the first naive run, see `ablation_groups.py`."""
    fine_tunes: bool = False
    """Whether end tasks are learned; otherwise models are only kept for a tier that does it later."""
    task_variants: tuple[str, ...] = ()
    """Groups whose models are kept and fine-tuned on the end tasks."""
    task_runs: tuple[int, ...] = (0,)
    """Seeds of the runs whose models are."""
    task_seeds: int = 5
    """Fine-tuning seeds of each end task."""
    task_settings: Values = field(default_factory=dict)
    """Keys of every task's section."""
    head_epochs: int = 1
    """Passes over the text by which the base encoder's new head is trained alone, before pre-training trains both."""
    pretraining: dict[BaseName, Values] = field(default_factory=dict)
    """Base model -> keys of the run that pre-trains it on the general corpus."""

    @property
    def recorded_settings(self) -> Values:
        """The settings, with the size of the sample and the length of the search."""
        length = {} if self.lr_search_steps is None else {"lr_search_steps": self.lr_search_steps}
        return {**self.settings, "num_samples": self.num_samples, **length}

    @property
    def run_folder(self) -> str:
        """Name of the folder of its runs."""
        return self.runs_of or self.name

    @property
    def corpora(self) -> list[str]:
        """Domains of all suites, without repeats."""
        return list(dict.fromkeys(domain for suite in self.suites for domain in suite.domains))

    @property
    def bases(self) -> list[BaseName]:
        """Base models of all suites, without repeats."""
        return list(dict.fromkeys(suite.base for suite in self.suites))

    @property
    def groups(self) -> dict[str, list[Variant]]:
        """Label of what is compared -> the variant, or the strengths of which the best one is."""
        groups: dict[str, list[Variant]] = {}
        for variant in self.variants:
            if variant.is_compared:
                groups.setdefault(variant.group, []).append(variant)
        return groups

    @property
    def waves(self) -> list[list[str]]:
        """Labels of what is searched and run before the next ones: naive training and the contenders, then the rest."""
        first = [NAIVE, *(label for label in self.groups if label in self.contenders)]
        return [first, [label for label in self.groups if label not in first]]

    def searched_with(self, labels: Sequence[str]) -> list[Variant]:
        """Variants to search for these groups, with the variants that are only searched after the last group."""
        found = [variant for variant in self.variants if variant.is_compared and variant.group in labels]
        is_last = self.waves[-1] == labels
        return found + [variant for variant in self.variants if is_last and not variant.is_compared]

    def variant(self, label: str) -> Variant:
        """The variant with this label."""
        return next(variant for variant in self.variants if variant.label == label)

    def run_seeds(self, group: str) -> tuple[int, ...]:
        """Seeds of a group's runs."""
        return self.seeds + (self.more_seeds if group in (NAIVE, *self.contenders) else ())

    def rates(self, variant: Variant) -> list[float]:
        """First candidate learning rates of a variant."""
        return [rate * variant.rate_scale for rate in self.learning_rates]

    def steps(self, suite: Suite) -> int:
        """Steps per domain of a suite."""
        steps: int = self.settings["train"]["steps_per_domain"]
        return suite.steps or steps

    def search_steps(self, suite: Suite) -> int:
        """Steps per domain of a suite's search."""
        return min(self.steps(suite), self.lr_search_steps or self.steps(suite))

    def search_name(self, suite: Suite) -> str:
        """Name of a suite's search, which suites of one base model and length share."""
        return suite.base if suite.steps is None else f"{suite.base}_{self.search_steps(suite)}"


def sampling(method: Values, num_samples: int) -> Values:
    """Keys of the section `method` that give the size of the sample, where the method has one."""
    match parse_method(method):
        case SoftMaskedConfig():
            return {"importance": {"num_samples": num_samples}}
        case EwcConfig() | DirectionsConfig() | RegMeanConfig():
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
