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

    def run(self, variant: Variant, rate: float, seed: int, label: str) -> TrainingRun:
        """A run over all domains of the suite; the label is that of its group."""
        is_fine_tuned = label in self.tier.task_variants and seed in self.tier.task_runs
        keeps_models = is_fine_tuned or (label, seed) == (NAIVE, self.tier.seeds[0])
        values = self._values(variant, rate, seed, self.suite.domains, self.tier.steps(self.suite))
        return TrainingRun(self.folder / self.suite.name / _slug(label) / f"seed{seed}", values, keeps_models)

    def lr_search_run(self, variant: Variant, rate: float, again: bool = False) -> TrainingRun:
        """A run over the first domains for the search; `again`: the same run in another folder."""
        domains = self.suite.domains[:LR_SEARCH_DOMAINS]
        folder = self.folder / ("again" if again else "choice") / self.tier.search_name(self.suite)
        steps = self.tier.search_steps(self.suite)
        values = self._values(variant, rate, self.tier.lr_search_seed, domains, steps)
        return TrainingRun(folder / _slug(variant.label) / f"{rate:g}", values)

    def final_tasks(self, run: TrainingRun) -> FineTuning:
        """Fine-tuning of a run's last model on the tasks of all domains."""
        return self._fine_tuning(run, len(self.suite.domains) - 1, self.suite.domains)

    def earlier_tasks(self, run: TrainingRun) -> list[FineTuning]:
        """Fine-tuning of all earlier models, each on the task of its last domain."""
        return [self._fine_tuning(run, index, [name]) for index, name in enumerate(self.suite.domains[:-1])]

    def _fine_tuning(self, run: TrainingRun, index: int, domains: Sequence[str]) -> FineTuning:
        seeds = range(self.tier.task_seeds)
        tasks = [data.task(self.data, data.TASK_OF[name], seeds) | self.tier.task_settings for name in domains]
        return FineTuning(run, index, tasks)

    def _values(self, variant: Variant, rate: float, seed: int, domains: Sequence[str], steps: int) -> Values:
        return merge_values(
            {
                "model": {"name_or_path": str(self.base)},
                "domains": [data.corpus(self.data, domain) for domain in domains],
                "general": data.corpus(self.data, data.GENERAL),
                "data": {"cache_dir": str(self.folder.parent / "cache")},
                "train": {"learning_rate": rate},
                "seed": seed,
            },
            self.tier.settings,
            {"train": {"steps_per_domain": steps}},
            variant.overrides,
            {"method": sampling(variant.overrides.get("method", {}), self.tier.num_samples)},
        )


def loss_after_learning(results: Results) -> float:
    """Mean over domains of the loss right after learning the domain; the criterion of learning rates."""
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
