"""The runs of one track, stage by stage: variants, the line of naive runs, matched naive runs, groups, end tasks."""

from __future__ import annotations

import statistics

import torch

from benchmarks.domains.choice import Choice
from benchmarks.domains.experiment import Experiment, learned
from benchmarks.domains.groups import Restored, restored_losses
from benchmarks.domains.jobs import TrainingRun
from benchmarks.domains.matching import Match, Probe, match
from benchmarks.domains.plan import NAIVE
from benchmarks.domains.record import TrackRecord, compared
from benchmarks.domains.runner import Runner


class TrackRuns:
    """Everything that is run and known of one track.

    Args:
        experiment: the track and where its runs lie.
        choices: label -> chosen learning rate.
        runner: makes the runs.
    """

    def __init__(self, experiment: Experiment, choices: dict[str, Choice], runner: Runner) -> None:
        self._experiment, self._choices, self._runner = experiment, choices, runner
        self._runs: dict[str, list[TrainingRun]] = {}
        self._naive: dict[str, float] = {NAIVE: choices[NAIVE].learning_rate}
        """Label -> learning rate of the naive runs that matches are sought among."""
        self._matches: list[Match] = []
        self._groups: list[Restored] = []

    def record(self) -> TrackRecord:
        """What is known so far."""
        track = self._experiment.track
        return TrackRecord(
            name=track.name,
            base=track.base,
            comparison=compared(self._runs),
            matches=self._matches,
            groups=self._groups,
        )

    def run_variants(self) -> None:
        """Every variant at its chosen rate, and naive training at the rates of the line; all seeds."""
        tier = self._experiment.tier
        for variant in tier.compared:
            rate = self._choices[variant.label].learning_rate
            self._runs[variant.label] = [self._experiment.run(variant, rate, seed) for seed in tier.seeds]
        for factor in tier.line:
            self._add_naive(f"{NAIVE} x {factor:g}", factor * self._naive[NAIVE])
        self._runner.run([run for runs in self._runs.values() for run in runs])

    def match_naive(self) -> None:
        """Naive training at the rates at which it learns as much as the variants that are to be matched."""
        tier = self._experiment.tier
        for label in tier.matched:
            known = [Probe(rate, self._mean_learned(name)) for name, rate in self._naive.items()]
            self._matches.append(
                match(
                    label,
                    self._mean_learned(label),
                    known,
                    self._learned_at,
                    tolerance=tier.tolerance,
                    most_probes=tier.most_probes,
                )
            )

    def restore_groups(self, device: torch.device) -> None:
        """Of the first naive run, see `groups.py`."""
        self._groups = restored_losses(self._runs[NAIVE][0], device)

    def fine_tune(self) -> None:
        """End tasks of the variants that the tier names."""
        runs = [run for label in self._experiment.tier.task_variants for run in self._runs[label]]
        self._runner.run([job for run in runs for job in self._experiment.fine_tunings(run)])

    def _learned_at(self, rate: float) -> float:
        label = f"{NAIVE} at {rate:.3g}"
        self._add_naive(label, float(f"{rate:.3g}"))
        self._runner.run(self._runs[label])
        return self._mean_learned(label)

    def _add_naive(self, label: str, rate: float) -> None:
        variant, seeds = self._experiment.tier.variant(NAIVE), self._experiment.tier.seeds
        self._naive[label] = rate
        self._runs[label] = [self._experiment.run(variant, rate, seed, name=label) for seed in seeds]

    def _mean_learned(self, label: str) -> float:
        return statistics.fmean(learned(run.results()) for run in self._runs[label])
