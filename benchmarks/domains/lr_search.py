"""Learning rates, chosen for every variant from equally many candidates by its loss on the first two domains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.domains.jobs import TrainingRun
from benchmarks.domains.plan import NAIVE, Variant
from benchmarks.domains.runner import Runner
from benchmarks.domains.runs import Experiment, learned, learned_later
from das_ds.reporting.statistics import Point, pareto_front


@dataclass(frozen=True)
class Candidate:
    """One learning rate and what came of it."""

    learning_rate: float
    learned: float
    """Mean held-out loss right after learning: the criterion."""
    forgetting: float | None
    """Of the first domain, where it is defined; shown, not used."""
    learned_later: float | None = None
    """Loss right after learning the second domain, which the first is forgotten by; None in results of before it was
    recorded."""

    @property
    def place(self) -> float:
        """Where it lies on the line of naive candidates."""
        return self.learned if self.learned_later is None else self.learned_later


@dataclass(frozen=True)
class Choice:
    """The candidates of one variant in ascending order."""

    label: str
    candidates: tuple[Candidate, ...]

    @property
    def learning_rate(self) -> float:
        """The candidate that learned best; of equals the smaller."""
        return min(self.candidates, key=lambda candidate: candidate.learned).learning_rate

    @property
    def is_at_edge(self) -> bool:
        """Whether the best is the first or the last, so that a better one may lie beyond."""
        rates = [candidate.learning_rate for candidate in self.candidates]
        return len(rates) > 1 and self.learning_rate in (rates[0], rates[-1])


def choose(
    experiment: Experiment, variants: Sequence[Variant], runner: Runner, known: Sequence[Choice] = ()
) -> dict[str, Choice]:
    """Label -> choice, first of `variants`, then of what else is known; makes the runs that are missing.

    Args:
        experiment: the track whose first domains are learned.
        variants: to choose for.
        runner: makes the runs.
        known: choices that were made before.

    Raises:
        StoppedError, TrainingError: see `Runner.run`.
    """
    before = {choice.label: choice for choice in known}
    runs = {
        variant.label: [experiment.lr_search_run(variant, rate) for rate in experiment.tier.rates(variant)]
        for variant in variants
        if variant.label not in before
    }
    runner.run([run for of_label in runs.values() for run in of_label])
    made = {
        variant.label: _choice(variant.label, experiment.tier.rates(variant), runs[variant.label])
        for variant in variants
        if variant.label in runs
    }
    return {label: (before | made)[label] for label in dict.fromkeys([*(v.label for v in variants), *before])}


def _choice(label: str, rates: Sequence[float], runs: Sequence[TrainingRun]) -> Choice:
    found = [(rate, run.results()) for rate, run in zip(rates, runs, strict=True)]
    candidates = tuple(
        Candidate(rate, learned(results), results.forgetting.average, learned_later(results)) for rate, results in found
    )
    return Choice(label, candidates)


def is_naive(choice: Choice) -> bool:
    """Whether it is naive training, be it at other candidates."""
    return choice.label.split(",")[0] == NAIVE


def naive_front(choices: Sequence[Choice]) -> list[Point]:
    """Those candidates of naive training as (place, forgetting) that no other beats in both."""
    found = [one for choice in choices if is_naive(choice) for one in choice.candidates]
    points = [(one.place, one.forgetting) for one in found if one.forgetting is not None]
    return [points[place] for place in pareto_front(points)]
