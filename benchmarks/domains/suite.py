"""The runs of one suite, stage by stage: variants, naive sweep, matched naive runs, parameter groups, end tasks."""

from __future__ import annotations

import statistics
from functools import partial

import torch

from benchmarks.domains.ablation_groups import RestoredLosses, measure_restored_losses
from benchmarks.domains.jobs import TrainingRun
from benchmarks.domains.lr_matching import Match, Probe, match
from benchmarks.domains.lr_search import Choice
from benchmarks.domains.plan import NAIVE, Variant
from benchmarks.domains.result_file import SuiteResult, compare_finished_runs
from benchmarks.domains.resume_results import check_agreement, find_run, join_comparisons
from benchmarks.domains.runner import Runner
from benchmarks.domains.runs import RunFactory
from das_ds.reporting.comparison import Comparison


class SuiteRuns:
    """The runs of a suite and their results so far.

    Args:
        factory: builds the runs.
        choices: label -> chosen learning rate.
        runner: makes the runs.
        known: earlier results, whose runs are not repeated, except for one, which must agree.
    """

    def __init__(
        self, factory: RunFactory, choices: dict[str, Choice], runner: Runner, known: SuiteResult | None = None
    ) -> None:
        self._factory = factory
        self._choices = choices
        self._runner = runner
        self._known = known
        self._runs: dict[str, list[TrainingRun]] = {}
        """Label -> runs made here."""
        self._naive_rates: dict[str, float] = {NAIVE: choices[NAIVE].learning_rate}
        """Label -> learning rate of naive runs, which matching starts from."""
        self._matches: dict[str, Match] = {found.label: found for found in known.matches} if known else {}
        self._groups: list[RestoredLosses] = known.groups if known else []
        self.difference: float | None = None
        """Largest difference in nats of any loss of the repeated known run; None without one."""

    def result(self) -> SuiteResult:
        """Results so far."""
        suite = self._factory.suite
        return SuiteResult(
            name=suite.name,
            base=suite.base,
            comparison=self._comparison(),
            matches=list(self._matches.values()),
            groups=self._groups,
        )

    def run_variants(self) -> None:
        """Run every variant at its chosen rate, and naive training at the rates of the sweep; all seeds."""
        tier = self._factory.tier
        for variant in tier.compared:
            self._add(variant, self._choices[variant.label].learning_rate)
        for factor in tier.sweep_factors:
            self._add_naive(f"{NAIVE} x {factor:g}", factor * self._naive_rates[NAIVE])
        for rate in self._known_matching_rates():
            self._add_naive_at(rate)
        self._runner.run([run for runs in self._runs.values() for run in runs])
        first = find_run(self._known, NAIVE, tier.seeds[0])
        if first is not None:
            repeated = compare_finished_runs(self._runs).group(NAIVE).runs[0]
            self.difference = check_agreement(first, repeated)

    def match_naive(self) -> None:
        """Run naive training at rates at which it learns as much as each variant to match."""
        tier = self._factory.tier
        for label in tier.matched:
            # Once per match: it reads all run folders, with their importance files.
            comparison = self._comparison()
            known = [
                Probe(rate, self._mean_loss(comparison, name, seeds_of=label))
                for name, rate in self._naive_rates.items()
            ]
            self._matches[label] = match(
                label,
                self._mean_loss(comparison, label, seeds_of=label),
                known,
                partial(self._run_naive_at, matched=label),
                tolerance=tier.tolerance,
                max_probes=tier.max_probes,
            )

    def restore_groups(self, device: torch.device) -> None:
        """Measure what each parameter group contributes to forgetting, on the first naive run."""
        if not self._groups:
            self._groups = measure_restored_losses(self._runs[NAIVE][0], device)

    def fine_tune(self) -> None:
        """Fine-tune on the end tasks, for the variants that the tier names."""
        runs = [run for label in self._factory.tier.task_variants for run in self._runs[label]]
        self._runner.run([job for run in runs for job in self._factory.fine_tuning_jobs(run)])

    def _run_naive_at(self, rate: float, matched: str) -> float:
        """Loss after learning domains 2..T of naive training at a rate, over the seeds of the matched variant."""
        label = self._add_naive_at(rate)
        self._runner.run(self._runs[label])
        return self._mean_loss(self._comparison(), label, seeds_of=matched)

    def _add_naive_at(self, rate: float) -> str:
        """Add a rate of the matching, rounded to the digits of its label; returns the label."""
        label = _format_naive_label(rate)
        self._add_naive(label, float(f"{rate:.3g}"))
        return label

    def _add_naive(self, label: str, rate: float) -> None:
        self._naive_rates[label] = rate
        self._add(self._factory.tier.variant(NAIVE), rate, label)

    def _add(self, variant: Variant, rate: float, name: str | None = None) -> None:
        """Add the unknown runs of a variant, and always the first naive one, which checks the known results."""
        tier = self._factory.tier
        label = name or variant.label
        self._runs[label] = [
            self._factory.run(variant, rate, seed, name)
            for seed in tier.run_seeds(variant.label)
            if not self._is_known(label, seed) or (label, seed) == (NAIVE, tier.seeds[0])
        ]

    def _is_known(self, label: str, seed: int) -> bool:
        run = find_run(self._known, label, seed)
        return run is not None and (run.end_tasks is not None or label not in self._factory.tier.task_variants)

    def _known_matching_rates(self) -> list[float]:
        """Naive rates that known matches have tried."""
        labels = {group.label for group in self._known.comparison.groups} if self._known else set()
        rates = {probe.learning_rate for found in self._matches.values() for probe in found.probes}
        return sorted(rate for rate in rates if _format_naive_label(rate) in labels)

    def _comparison(self) -> Comparison:
        """Of all finished runs."""
        new = compare_finished_runs(self._runs)
        return join_comparisons(self._known.comparison, new) if self._known else new

    def _mean_loss(self, comparison: Comparison, label: str, *, seeds_of: str) -> float:
        """Mean loss after learning domains 2..T of a group, over the seeds of another variant."""
        seeds = self._factory.tier.run_seeds(seeds_of)
        runs = comparison.group(label).runs
        return statistics.fmean(run.loss_after_learning_later for run in runs if run.seed in seeds)


def _format_naive_label(rate: float) -> str:
    return f"{NAIVE} at {rate:.3g}"
