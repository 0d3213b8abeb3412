"""The runs of one track: which config each has, and in which folder it lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.domains import data
from benchmarks.domains.jobs import FineTuning, TrainingRun
from benchmarks.domains.plan import LR_SEARCH_DOMAINS, NAIVE, Tier, Track, Values, Variant, merged
from das_ds.reporting.results import Results


@dataclass(frozen=True)
class Experiment:
    """A track of a tier with everything that its runs need."""

    tier: Tier
    track: Track
    folder: Path
    """Of the tier's runs."""
    data: Path
    """Of the corpora."""
    base: Path
    """The base model."""

    def run(self, variant: Variant, rate: float, seed: int, name: str | None = None) -> TrainingRun:
        """A run over all domains of the track; `name` is its folder's in place of the variant's label."""
        label = name or variant.label
        keeps = (variant.label == NAIVE and name is None) or label in self.tier.task_variants
        values = self._values(variant, rate, seed, self.track.domains)
        if label in self.tier.task_variants:
            values["tasks"] = [data.task(self.data, task, range(self.tier.task_seeds)) for task in data.TASKS]
        folder = self.folder / self.track.name / _slug(label) / f"seed{seed}"
        return TrainingRun(folder, values, keeps_models=keeps)

    def lr_search_run(self, variant: Variant, rate: float, again: bool = False) -> TrainingRun:
        """A run over the first domains that helps to choose a learning rate; `again`: the same in another folder."""
        domains = self.track.domains[:LR_SEARCH_DOMAINS]
        folder = self.folder / ("again" if again else "choice") / self.track.base / _slug(variant.label)
        return TrainingRun(folder / f"{rate:g}", self._values(variant, rate, self.tier.lr_search_seed, domains))

    def fine_tuning_jobs(self, run: TrainingRun) -> list[FineTuning]:
        """Each domain's task after the domain, and all tasks after the last."""
        order, last = self.track.domains, len(self.track.domains) - 1
        jobs = [
            FineTuning(run, index, (data.TASK_OF[domain],), self.tier.task_seeds)
            for index, domain in enumerate(order[:last])
        ]
        return [*jobs, FineTuning(run, last, tuple(data.TASK_OF[domain] for domain in order), self.tier.task_seeds)]

    def _values(self, variant: Variant, rate: float, seed: int, domains: Sequence[str]) -> Values:
        return merged(
            {
                "model": {"name_or_path": str(self.base)},
                "domains": [data.corpus(self.data, domain) for domain in domains],
                "general": data.corpus(self.data, data.GENERAL),
                "data": {"cache_dir": str(self.folder / "cache")},
                "train": {"learning_rate": rate},
                "seed": seed,
            },
            self.tier.settings,
            variant.overrides,
        )


def learned(results: Results) -> float:
    """Mean loss of the domains, each right after it was learned; what learning rates are chosen by."""
    losses = _losses_when_learned(results)
    return sum(losses) / len(losses)


def learned_later(results: Results) -> float:
    """The same over all domains but the first, whose learning is what the earlier ones are forgotten by."""
    losses = _losses_when_learned(results)[1:]
    return sum(losses) / len(losses)


def _losses_when_learned(results: Results) -> list[float]:
    # What is learned at once, by `pool`, has one row after it.
    last = len(results.loss_matrix) - 1
    return [results.loss_matrix[min(index + 1, last)][index] for index in range(len(results.domains))]


def _slug(label: str) -> str:
    return label.replace(",", "").replace(" ", "_")
