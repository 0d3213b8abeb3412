"""What is run, as plain data: tiers, their models and orders of domains, and the variants that are compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

BaseName = Literal["encoder", "decoder"]
Values = dict[str, Any]
"""Nested keys of a run config."""

NAIVE = "ncl"
"""Label of naive training, which all others are held against."""
LR_SEARCH_DOMAINS = 2
"""First domains of an order that learning rates are chosen on."""


@dataclass(frozen=True)
class Variant:
    """One method with its settings."""

    label: str
    overrides: Values
    """Keys of the run config in which it differs from the tier's settings; the learning rate is chosen."""
    rate_scale: float = 1.0
    """Its candidates are the tier's times this, so that every variant has equally many."""
    is_compared: bool = True
    """Whether it is run over all domains; what is only searched is tried where learning rates are chosen, on the first
    two."""


@dataclass(frozen=True)
class Track:
    """One base model over one order of domains: the runs that are compared with each other."""

    name: str
    base: BaseName
    domains: tuple[str, ...]


@dataclass(frozen=True)
class Tier:
    """A benchmark of one size."""

    name: str
    tracks: tuple[Track, ...]
    settings: Values
    """Keys of the run config that all runs share."""
    learning_rates: tuple[float, ...]
    """Candidates, in ascending order."""
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    lr_search_seed: int
    """Of the runs that choose learning rates; none of `seeds`."""
    line: tuple[float, ...]
    """Naive training is run at these multiples of its chosen rate as well: what it costs and gives to learn less."""
    matched: tuple[str, ...]
    """Variants whose learning naive training is matched to, see `matching.py`."""
    repeated: str
    """Variant whose first run of the choice is made twice, which must give the same numbers."""
    threads: int
    """Of each run; sums in another order differ in their last digits."""
    contenders: tuple[str, ...] = ()
    """Variants that are run with `more_seeds` as well. They make the families of tests, fixed here before anything is
    run: each of them against the line of naive training, and the matched ones beside the others."""
    more_seeds: tuple[int, ...] = ()
    """Of the contenders and of naive training."""
    parallel: int = 1
    """Runs at a time."""
    tolerance: float = 0.01
    """Nats by which a matched loss on domains 2..T may differ."""
    max_probes: int = 4
    """Learning rates that are tried to match one variant."""
    task_seeds: int = 0
    """Seeds of each end task; 0: no end tasks."""
    task_variants: tuple[str, ...] = ()
    """Variants whose models are fine-tuned on the end tasks."""
    pretraining: dict[BaseName, Values] = field(default_factory=dict)
    """Base model -> keys of the run that pre-trains it on the general corpus."""

    @property
    def corpora(self) -> list[str]:
        """Domains of all tracks, each once."""
        return list(dict.fromkeys(domain for track in self.tracks for domain in track.domains))

    @property
    def bases(self) -> list[BaseName]:
        """Base models of all tracks, each once."""
        return list(dict.fromkeys(track.base for track in self.tracks))

    @property
    def compared(self) -> list[Variant]:
        """Those that are run over all domains."""
        return [variant for variant in self.variants if variant.is_compared]

    def variant(self, label: str) -> Variant:
        """The variant of this label."""
        return next(variant for variant in self.variants if variant.label == label)

    def run_seeds(self, label: str) -> tuple[int, ...]:
        """Of the runs of a variant."""
        return self.seeds + (self.more_seeds if label in (NAIVE, *self.contenders) else ())

    def rates(self, variant: Variant) -> list[float]:
        """Candidates of a variant."""
        return [rate * variant.rate_scale for rate in self.learning_rates]


def merged(first: Values, *others: Values) -> Values:
    """Nested keys of all, later ones over earlier ones; lists are replaced whole."""
    result = dict(first)
    for other in others:
        for key, value in other.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else value
    return result
