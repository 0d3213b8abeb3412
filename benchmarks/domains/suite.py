"""The runs of one suite: in waves of groups and seed by seed, so that every prefix can be compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.domains.ablation_groups import RestoredLosses, measure_restored_losses
from benchmarks.domains.jobs import Job, TrainingRun
from benchmarks.domains.lr_search import LrSearch
from benchmarks.domains.plan import NAIVE, Variant
from benchmarks.domains.result_file import SuiteResult
from benchmarks.domains.resume_results import check_agreement, find_run, join_comparisons
from benchmarks.domains.runner import Runner
from benchmarks.domains.runs import RunFactory
from das_ds.reporting.comparison import Comparison
from das_ds.reporting.group_runs import compare_runs
from das_ds.reporting.load_runs import LoadedRun, load_run


class SuiteRuns:
    """The runs of a suite and their results so far.

    Args:
        factory: builds the runs.
        search: finds learning rates and strengths.
        runner: makes the runs.
        known: earlier results, whose runs are not repeated, except for one, which must agree.
        on_update: called after each run.
    """

    def __init__(
        self,
        factory: RunFactory,
        search: LrSearch,
        runner: Runner,
        known: SuiteResult | None = None,
        on_update: Callable[[], None] = lambda: None,
    ) -> None:
        self._factory = factory
        self._search = search
        self._runner = runner
        self._known = known
        self._on_update = on_update
        self._planned: dict[str, tuple[Variant, float, tuple[int, ...]]] = {}
        """Label -> variant, learning rate, seeds."""
        self._started: dict[Path, tuple[str, TrainingRun]] = {}
        """Folder -> label and run, of all made here."""
        self._loaded: dict[Path, LoadedRun] = {}
        self._groups: list[RestoredLosses] = known.groups if known else []
        self.difference: float | None = None
        """Largest difference in nats of any loss of the repeated known run; None without one."""

    def result(self) -> SuiteResult | None:
        """Results so far; None before the first naive run."""
        comparison = self._comparison()
        if comparison is None:
            return None
        suite = self._factory.suite
        return SuiteResult(
            name=suite.name,
            base=suite.base,
            steps_per_domain=self._factory.tier.steps(suite),
            comparison=comparison,
            groups=self._groups,
        )

    def run(self, device: torch.device) -> None:
        """Make all runs: the first seed of the contenders, then of all others, then the other seeds of all groups.

        Args:
            device: to evaluate restored parameter groups on.
        """
        tier = self._factory.tier
        first, *others = tier.seeds
        for labels in tier.waves:
            self._search.run(tier.searched_with(labels))
            for label in labels:
                self.plan(label)
            self.train(first)
            self._restore_groups(device)
        for seed in (*others, *tier.more_seeds):
            self.train(seed)
        if tier.fine_tunes:
            self._fine_tune()

    def train(self, seed: int) -> None:
        """Run all groups so far that have a seed."""
        runs = []
        for label, (variant, rate, seeds) in self._planned.items():
            # The first naive run is always made: it checks known results, and its models are needed.
            if seed in seeds and (not self._is_known(label, seed) or self._is_first(label, seed)):
                run = self._factory.run(variant, rate, seed, label)
                self._started[run.folder] = label, run
                runs.append(run)
        self._check_repeated()
        self._runner.run(runs, self._finish)

    def plan(self, label: str) -> None:
        """Plan the runs of a group at its chosen rate, and with naive training its sweep."""
        tier = self._factory.tier
        variant, rate = self._search.chosen(label)
        self._planned[label] = variant, rate, tier.run_seeds(label)
        if label == NAIVE:
            for factor in tier.sweep_factors:
                self._planned[f"{NAIVE} x {factor:g}"] = variant, factor * rate, tier.run_seeds(NAIVE)

    def _finish(self, _: Job) -> None:
        self._check_repeated()
        self._on_update()

    def _is_first(self, label: str, seed: int) -> bool:
        return (label, seed) == (NAIVE, self._factory.tier.seeds[0])

    def _is_known(self, label: str, seed: int) -> bool:
        tier = self._factory.tier
        run = find_run(self._known, label, seed)
        needs_model = tier.fine_tunes and label in tier.task_variants and seed in tier.task_runs
        has_scores = run is not None and run.end_tasks is not None and len(run.end_tasks.tasks) == len(run.learned_rows)
        return run is not None and (has_scores or not needs_model)

    def _check_repeated(self) -> None:
        """Check the repeated naive run as soon as it is there."""
        seed = self._factory.tier.seeds[0]
        known = find_run(self._known, NAIVE, seed)
        if known is None or self.difference is not None or not (loaded := self._load_finished()):
            return
        naive = [run for run in loaded if run.label == NAIVE and run.config.seed == seed]
        if naive:
            self.difference = check_agreement(known, compare_runs(naive).groups[0].runs[0])

    def _restore_groups(self, device: torch.device) -> None:
        """Measure what each parameter group contributes to forgetting, on the first naive run."""
        if self._factory.tier.restores_groups and not self._groups:
            first = next(run for label, run in self._started.values() if label == NAIVE)
            self._groups = measure_restored_losses(first, device)
            self._on_update()

    def _fine_tune(self) -> None:
        """Learn the end tasks: first all of them at the end of every run, then each domain's after the domain."""
        tier = self._factory.tier
        runs = [
            run
            for wanted in tier.task_variants
            for label, run in self._started.values()
            if label == wanted and run.values["seed"] in tier.task_runs
        ]
        self._runner.run([self._factory.final_tasks(run) for run in runs], self._finish)
        self._runner.run([job for run in runs for job in self._factory.earlier_tasks(run)], self._finish)

    def _load_finished(self) -> list[LoadedRun]:
        """All finished runs made here."""
        for folder, (label, run) in self._started.items():
            if folder not in self._loaded and run.is_done():
                self._loaded[folder] = load_run(f"{label}={folder}")
        return list(self._loaded.values())

    def _comparison(self) -> Comparison | None:
        """Of all finished runs; None before the first naive run."""
        known = self._known.comparison if self._known else None
        loaded = self._load_finished()
        if not any(run.label == NAIVE for run in loaded):
            return known
        new = compare_runs(loaded, NAIVE)
        return join_comparisons(known, new) if known else new
