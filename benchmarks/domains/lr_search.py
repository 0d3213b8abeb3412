"""Learning-rate search: every variant gets equally many candidates, chosen by loss on the first two domains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.domains.jobs import TrainingRun
from benchmarks.domains.plan import NAIVE, Variant
from benchmarks.domains.runner import Runner
from benchmarks.domains.runs import RunFactory, loss_after_learning, loss_after_learning_later
from das_ds.reporting.statistics import Point, pareto_front


@dataclass(frozen=True)
class Candidate:
    """One learning rate and its results."""

    learning_rate: float
    learned: float
    """Mean held-out loss after learning, in nats: the criterion."""
    forgetting: float | None
    """Of the first domain, where defined; shown, but not used to choose."""
    learned_later: float | None = None
    """Loss after learning the second domain, which makes the model forget the first; None in older results."""

    @property
    def matching_loss(self) -> float:
        """The loss at which it is compared with naive candidates."""
        return self.learned if self.learned_later is None else self.learned_later


@dataclass(frozen=True)
class Choice:
    """The candidates of one variant in ascending order."""

    label: str
    candidates: tuple[Candidate, ...]

    @property
    def learning_rate(self) -> float:
        """The rate with the lowest loss after learning; the smaller one of equals."""
        return min(self.candidates, key=lambda candidate: candidate.learned).learning_rate

    @property
    def is_at_edge(self) -> bool:
        """Whether the best rate is the first or last candidate, so that a better one may be outside the range."""
        rates = [candidate.learning_rate for candidate in self.candidates]
        return len(rates) > 1 and self.learning_rate in (rates[0], rates[-1])


def choose(
    factory: RunFactory, variants: Sequence[Variant], runner: Runner, known: Sequence[Choice] = ()
) -> dict[str, Choice]:
    """Choose a learning rate for every variant, running what is missing.

    Args:
        factory: of the suite whose first domains are learned.
        variants: to choose for.
        runner: makes the runs.
        known: choices that were made before.

    Returns:
        Label -> choice: first those of `variants`, then all others that are known.

    Raises:
        StoppedError, TrainingError: see `Runner.run`.
    """
    choices = {choice.label: choice for choice in known}
    runs = {
        variant.label: [factory.lr_search_run(variant, rate) for rate in factory.tier.rates(variant)]
        for variant in variants
        if variant.label not in choices
    }
    runner.run([run for variant_runs in runs.values() for run in variant_runs])
    for variant in variants:
        if variant.label in runs:
            choices[variant.label] = _choice(variant.label, factory.tier.rates(variant), runs[variant.label])
    order = dict.fromkeys([*(variant.label for variant in variants), *(choice.label for choice in known)])
    return {label: choices[label] for label in order}


def _choice(label: str, rates: Sequence[float], runs: Sequence[TrainingRun]) -> Choice:
    candidates = []
    for rate, run in zip(rates, runs, strict=True):
        results = run.results()
        candidates.append(
            Candidate(
                learning_rate=rate,
                learned=loss_after_learning(results),
                forgetting=results.forgetting.average,
                learned_later=loss_after_learning_later(results),
            )
        )
    return Choice(label, tuple(candidates))


def is_naive(choice: Choice) -> bool:
    """Whether it is naive training, possibly with other candidates."""
    return choice.label.split(",")[0] == NAIVE


def naive_front(choices: Sequence[Choice]) -> list[Point]:
    """Pareto front of the naive candidates as (matching loss, forgetting)."""
    candidates = [candidate for choice in choices if is_naive(choice) for candidate in choice.candidates]
    points = [
        (candidate.matching_loss, candidate.forgetting) for candidate in candidates if candidate.forgetting is not None
    ]
    return [points[index] for index in pareto_front(points)]
