"""Search of learning rates and strengths, on the first two domains and with one seed that no compared run has.

Every variant has the same first candidates; while its best one is the first or last, further rates are tried beyond it.
The rate is that with the lowest loss after learning. Of several strengths of one method, each at its own rate, the one
with the lowest loss at the end of both domains is compared, since a weaker one always learns more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.domains.jobs import Job, TrainingRun
from benchmarks.domains.plan import LR_SEARCH_DOMAINS, NAIVE, Variant
from benchmarks.domains.runner import Runner
from benchmarks.domains.runs import RunFactory, loss_after_learning, loss_after_learning_later
from das_ds.reporting.results import Results
from das_ds.reporting.statistics import Point, pareto_front


@dataclass(frozen=True)
class Candidate:
    """One learning rate and its results."""

    learning_rate: float
    learned: float
    """Mean held-out loss after learning, in nats: the criterion of rates."""
    forgetting: float | None
    """Of the first domain, where defined."""
    learned_later: float | None = None
    """Loss after learning the second domain, which makes the model forget the first; None in older results."""

    @property
    def matching_loss(self) -> float:
        """The loss at which it is compared with naive candidates."""
        return self.learned if self.learned_later is None else self.learned_later

    @property
    def final_loss(self) -> float:
        """Mean loss of both domains at the end, the criterion of strengths: only the first can have been forgotten."""
        return self.learned + (self.forgetting or 0.0) / LR_SEARCH_DOMAINS


@dataclass(frozen=True)
class Choice:
    """The candidates of one variant so far, in ascending order."""

    label: str
    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate:
        """The candidate with the lowest loss after learning; the smaller rate of equals."""
        return min(self.candidates, key=lambda candidate: candidate.learned)

    @property
    def learning_rate(self) -> float:
        """The best rate."""
        return self.best.learning_rate

    @property
    def is_at_edge(self) -> bool:
        """Whether the best rate is the first or last candidate, so that a better one may be outside the range."""
        return len(self.candidates) > 1 and self.best in (self.candidates[0], self.candidates[-1])

    def with_candidate(self, candidate: Candidate) -> Choice:
        """A copy with one more candidate."""
        candidates = sorted([*self.candidates, candidate], key=lambda one: one.learning_rate)
        return Choice(self.label, tuple(candidates))


def missing_rates(choice: Choice, first: Sequence[float], max_extensions: int) -> list[float]:
    """Rates to run next; empty if the choice is final.

    Args:
        choice: candidates so far.
        first: first candidates of every variant, in ascending order.
        max_extensions: further candidates on each side, each half the lowest or twice the highest one.
    """
    tried = [candidate.learning_rate for candidate in choice.candidates]
    if missing := [rate for rate in first if rate not in tried]:
        return missing
    if not choice.is_at_edge:
        return []
    extension = tried[0] / 2 if choice.learning_rate == tried[0] else tried[-1] * 2
    is_allowed = first[0] / 2**max_extensions <= extension <= first[-1] * 2**max_extensions
    return [extension] if is_allowed else []


class LrSearch:
    """The search of one base model and length.

    Args:
        factory: of a suite whose first domains are learned.
        runner: makes the runs.
        known: candidates that were run before.
        on_update: called after each run.
    """

    def __init__(
        self,
        factory: RunFactory,
        runner: Runner,
        known: Sequence[Choice] = (),
        on_update: Callable[[], None] = lambda: None,
    ) -> None:
        self._factory = factory
        self._runner = runner
        self._choices = {choice.label: choice for choice in known}
        self._on_update = on_update
        self._labels: dict[Path, str] = {}
        """Folder of a run -> label of its variant."""

    @property
    def choices(self) -> list[Choice]:
        """All candidates so far, in the order in which variants were searched."""
        return [choice for choice in self._choices.values() if choice.candidates]

    @property
    def strengths(self) -> dict[str, str]:
        """Group -> the variant that is compared, for finished searches of groups of several strengths."""
        groups = {label: members for label, members in self._factory.tier.groups.items() if len(members) > 1}
        return {label: self.chosen(label)[0].label for label, members in groups.items() if self._is_done(members)}

    def run(self, variants: Sequence[Variant]) -> None:
        """Run all missing candidates of these variants.

        Raises:
            StoppedError, TrainingError: see `Runner.run`.
        """
        while jobs := [run for variant in variants for run in self._next_runs(variant)]:
            for run in jobs:
                if run.is_done():
                    self._record(run)
            self._runner.run(jobs, self._finish)

    def chosen(self, group: str) -> tuple[Variant, float]:
        """The variant that is compared in a group, and its learning rate."""
        members = self._factory.tier.groups[group]
        variant = min(members, key=lambda member: self._choices[member.label].best.final_loss)
        return variant, self._choices[variant.label].learning_rate

    def _next_runs(self, variant: Variant) -> list[TrainingRun]:
        runs = [self._factory.lr_search_run(variant, rate) for rate in self._missing_rates(variant)]
        self._labels |= {run.folder: variant.label for run in runs}
        return runs

    def _missing_rates(self, variant: Variant) -> list[float]:
        tier = self._factory.tier
        choice = self._choices.setdefault(variant.label, Choice(variant.label, ()))
        return missing_rates(choice, tier.rates(variant), tier.max_extensions)

    def _is_done(self, variants: Iterable[Variant]) -> bool:
        return not any(self._missing_rates(variant) for variant in variants)

    def _finish(self, job: Job) -> None:
        assert isinstance(job, TrainingRun), "the search trains"
        self._record(job)
        self._on_update()

    def _record(self, run: TrainingRun) -> None:
        label = self._labels[run.folder]
        rate: float = run.values["train"]["learning_rate"]
        self._choices[label] = self._choices[label].with_candidate(_candidate(rate, run.results()))


def _candidate(rate: float, results: Results) -> Candidate:
    return Candidate(
        learning_rate=rate,
        learned=loss_after_learning(results),
        forgetting=results.forgetting.average,
        learned_later=loss_after_learning_later(results),
    )


def is_naive(choice: Choice) -> bool:
    """Whether it is naive training, possibly with other candidates."""
    return choice.label in (NAIVE, f"{NAIVE}, faster", f"{NAIVE}, slower")


def naive_front(choices: Sequence[Choice]) -> list[Point]:
    """Pareto front of the naive candidates as (matching loss, forgetting)."""
    candidates = [candidate for choice in choices if is_naive(choice) for candidate in choice.candidates]
    points = [
        (candidate.matching_loss, candidate.forgetting) for candidate in candidates if candidate.forgetting is not None
    ]
    return [points[index] for index in pareto_front(points)]
