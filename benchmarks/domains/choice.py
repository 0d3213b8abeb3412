"""Learning rates, chosen for every variant from equally many candidates by its loss on the first two domains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.domains.experiment import Experiment, learned
from benchmarks.domains.plan import Variant
from benchmarks.domains.runner import Runner


@dataclass(frozen=True)
class Candidate:
    """One learning rate and what came of it."""

    learning_rate: float
    learned: float
    """Mean held-out loss right after learning: the criterion."""
    forgetting: float | None
    """Of the first domain, where it is defined; shown, not used."""


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


def choose(experiment: Experiment, variants: Sequence[Variant], runner: Runner) -> dict[str, Choice]:
    """Label -> choice; makes the runs that are missing.

    Raises:
        StoppedError, TrainingError: see `Runner.run`.
    """
    runs = {
        (variant.label, rate): experiment.choice_run(variant, rate)
        for variant in variants
        for rate in experiment.tier.rates(variant)
    }
    runner.run(list(runs.values()))
    found: dict[str, list[Candidate]] = {variant.label: [] for variant in variants}
    for (label, rate), run in runs.items():
        results = run.results()
        found[label].append(Candidate(rate, learned(results), results.forgetting.average))
    return {label: Choice(label, tuple(candidates)) for label, candidates in found.items()}
