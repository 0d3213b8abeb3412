"""The runs of one suite: the config and the folder of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.domains import data
from benchmarks.domains.jobs import FineTuning, TrainingRun
from benchmarks.domains.plan import LR_SEARCH_DOMAINS, NAIVE, Suite, Tier, Values, Variant, merge_values, sampling
from das_ds.reporting.results import Results


@dataclass(frozen=True)
class RunFactory:
    """Builds the runs of a suite of a tier."""

    tier: Tier
    suite: Suite
    folder: Path
    """Of the tier's runs."""
    data: Path
    """Of the corpora."""
    base: Path
    """The base model."""

    def run(self, variant: Variant, rate: float, seed: int, name: str | None = None) -> TrainingRun:
        """A run over all domains of the suite; `name` replaces the variant's label in the folder."""
        label = name or variant.label
        keeps = (variant.label == NAIVE and name is None) or label in self.tier.task_variants
        values = self._values(variant, rate, seed, self.suite.domains)
        if label in self.tier.task_variants:
            values["tasks"] = [data.task(self.data, task, range(self.tier.task_seeds)) for task in data.TASKS]
        folder = self.folder / self.suite.name / _slug(label) / f"seed{seed}"
        return TrainingRun(folder, values, keeps_models=keeps)

    def lr_search_run(self, variant: Variant, rate: float, again: bool = False) -> TrainingRun:
        """A run over the first domains for the learning-rate search; `again`: the same run in another folder."""
        domains = self.suite.domains[:LR_SEARCH_DOMAINS]
        folder = self.folder / ("again" if again else "choice") / self.suite.base / _slug(variant.label)
        return TrainingRun(folder / f"{rate:g}", self._values(variant, rate, self.tier.lr_search_seed, domains))

    def fine_tuning_jobs(self, run: TrainingRun) -> list[FineTuning]:
        """Each domain's task after that domain, and all tasks after the last domain."""
        domains = self.suite.domains
        last = len(domains) - 1
        jobs = [
            FineTuning(run, index, (data.TASK_OF[domain],), self.tier.task_seeds)
            for index, domain in enumerate(domains[:last])
        ]
        return [*jobs, FineTuning(run, last, tuple(data.TASK_OF[domain] for domain in domains), self.tier.task_seeds)]

    def _values(self, variant: Variant, rate: float, seed: int, domains: Sequence[str]) -> Values:
        return merge_values(
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
            {"method": sampling(variant.overrides.get("method", {}), self.tier.num_samples)},
        )


def loss_after_learning(results: Results) -> float:
    """Mean over domains of the loss right after learning the domain; the criterion of the learning-rate search."""
    losses = _losses_after_learning(results)
    return sum(losses) / len(losses)


def loss_after_learning_later(results: Results) -> float:
    """The same over domains 2..T, which make the model forget earlier ones."""
    losses = _losses_after_learning(results)[1:]
    return sum(losses) / len(losses)


def _losses_after_learning(results: Results) -> list[float]:
    # Domains that `pool` learns at once share one row.
    last = len(results.loss_matrix) - 1
    return [results.loss_matrix[min(index + 1, last)][index] for index in range(len(results.domains))]


def _slug(label: str) -> str:
    return label.replace(",", "").replace(" ", "_")
