"""The runs of one track, stage by stage: variants, the line of naive runs, matched naive runs, groups, end tasks."""

from __future__ import annotations

import statistics
from functools import partial

import torch

from benchmarks.domains.ablation_groups import Restored, measure_restored_losses
from benchmarks.domains.jobs import TrainingRun
from benchmarks.domains.lr_matching import Match, Probe, match
from benchmarks.domains.lr_search import Choice
from benchmarks.domains.plan import NAIVE, Variant
from benchmarks.domains.result_file import SuiteResult, compared
from benchmarks.domains.resume_results import check_agreement, joined, known_run
from benchmarks.domains.runner import Runner
from benchmarks.domains.runs import Experiment
from das_ds.reporting.comparison import Comparison, RunSummary


class SuiteRuns:
    """Everything that is run and known of one track.

    Args:
        experiment: the track and where its runs lie.
        choices: label -> chosen learning rate.
        runner: makes the runs.
        known: results of runs that are not made again, but for one, which has to agree.
    """

    def __init__(
        self, experiment: Experiment, choices: dict[str, Choice], runner: Runner, known: SuiteResult | None = None
    ) -> None:
        self._experiment, self._choices, self._runner, self._known = experiment, choices, runner, known
        self._runs: dict[str, list[TrainingRun]] = {}
        """Label -> runs that are made here."""
        self._naive: dict[str, float] = {NAIVE: choices[NAIVE].learning_rate}
        """Label -> learning rate of the naive runs that matches are sought among."""
        self._matches: dict[str, Match] = {found.label: found for found in known.matches} if known else {}
        self._groups: list[Restored] = known.groups if known else []
        self.difference: float | None = None
        """Nats by which a loss of the known run that was made again differs at most; None: none is known."""

    def record(self) -> SuiteResult:
        """What is known so far."""
        track = self._experiment.track
        return SuiteResult(
            name=track.name,
            base=track.base,
            comparison=self._comparison(),
            matches=list(self._matches.values()),
            groups=self._groups,
        )

    def run_variants(self) -> None:
        """Every variant at its chosen rate, and naive training at the rates of the line; all seeds."""
        tier = self._experiment.tier
        for variant in tier.compared:
            self._add(variant, self._choices[variant.label].learning_rate)
        for factor in tier.line:
            self._add_naive(f"{NAIVE} x {factor:g}", factor * self._naive[NAIVE])
        for rate in self._known_rates():
            self._add_naive_at(rate)
        self._runner.run([run for runs in self._runs.values() for run in runs])
        first = known_run(self._known, NAIVE, tier.seeds[0])
        if first is not None:
            self.difference = check_agreement(first, compared(self._runs).group(NAIVE).runs[0])

    def match_naive(self) -> None:
        """Naive training at the rates at which it learns as much as the variants that are to be matched."""
        tier = self._experiment.tier
        for label in tier.matched:
            # Once: it reads all run folders, with their importance files.
            runs = self._comparison()
            known = [Probe(rate, self._mean_learned(runs, name, label)) for name, rate in self._naive.items()]
            self._matches[label] = match(
                label,
                self._mean_learned(runs, label, label),
                known,
                partial(self._learned_at, matched=label),
                tolerance=tier.tolerance,
                max_probes=tier.max_probes,
            )

    def restore_groups(self, device: torch.device) -> None:
        """Of the first naive run, see `groups.py`."""
        if not self._groups:
            self._groups = measure_restored_losses(self._runs[NAIVE][0], device)

    def fine_tune(self) -> None:
        """End tasks of the variants that the tier names."""
        runs = [run for label in self._experiment.tier.task_variants for run in self._runs[label]]
        self._runner.run([job for run in runs for job in self._experiment.fine_tuning_jobs(run)])

    def _learned_at(self, rate: float, matched: str) -> float:
        label = self._add_naive_at(rate)
        self._runner.run(self._runs[label])
        return self._mean_learned(self._comparison(), label, matched)

    def _add_naive_at(self, rate: float) -> str:
        """Adds a rate of the matching, to the digits that its label has; returns the label."""
        label = _format_naive_label(rate)
        self._add_naive(label, float(f"{rate:.3g}"))
        return label

    def _add_naive(self, label: str, rate: float) -> None:
        self._naive[label] = rate
        self._add(self._experiment.tier.variant(NAIVE), rate, label)

    def _add(self, variant: Variant, rate: float, name: str | None = None) -> None:
        """Those runs of a variant that are not known, and the first naive one."""
        tier, label = self._experiment.tier, name or variant.label
        self._runs[label] = [
            self._experiment.run(variant, rate, seed, name)
            for seed in tier.run_seeds(variant.label)
            if not self._is_known(label, seed) or (label, seed) == (NAIVE, tier.seeds[0])
        ]

    def _is_known(self, label: str, seed: int) -> bool:
        found = known_run(self._known, label, seed)
        return found is not None and (found.end_tasks is not None or label not in self._experiment.tier.task_variants)

    def _known_rates(self) -> list[float]:
        """Naive rates that known matches have tried."""
        labels = {group.label for group in self._known.comparison.groups} if self._known else set()
        rates = {probe.learning_rate for found in self._matches.values() for probe in found.probes}
        return sorted(rate for rate in rates if _format_naive_label(rate) in labels)

    def _comparison(self) -> Comparison:
        """Of all runs that are done."""
        new = compared(self._runs)
        return joined(self._known.comparison, new) if self._known else new

    def _mean_learned(self, comparison: Comparison, label: str, like: str) -> float:
        """Loss when learned on domains 2..T, over the seeds of the variant `like`."""
        seeds = self._experiment.tier.run_seeds(like)
        runs: list[RunSummary] = comparison.group(label).runs
        return statistics.fmean(run.loss_after_learning_later for run in runs if run.seed in seeds)


def _format_naive_label(rate: float) -> str:
    return f"{NAIVE} at {rate:.3g}"
