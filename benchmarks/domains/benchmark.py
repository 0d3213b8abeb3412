"""Runs a tier from its base models to its result file; called again, it resumes where it was interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.chaos.run_digest import TIMED
from benchmarks.domains.base import HeadTraining, base_decoder, base_encoder
from benchmarks.domains.lr_search import LrSearch
from benchmarks.domains.plan import BaseName, Tier
from benchmarks.domains.pretraining import pretraining_run
from benchmarks.domains.result_file import Extended, Repeated, TierResult, write_result_file
from benchmarks.domains.resume_results import find_suite
from benchmarks.domains.runner import Runner
from benchmarks.domains.runs import RunFactory
from benchmarks.domains.suite import SuiteRuns
from benchmarks.result_io import describe
from das_ds.reporting.results import Results


class Benchmark:
    """All stages of a tier.

    Args:
        tier: what to run.
        folder: of its runs.
        data: of the corpora.
        runner: makes the runs.
        device: for the base model's head and the ablation of parameter groups; part of the result file's name.
        result_path: the file to write.
        known: earlier results of this tier, whose runs are not repeated.
    """

    def __init__(
        self,
        tier: Tier,
        folder: Path,
        data: Path,
        runner: Runner,
        device: torch.device,
        result_path: Path,
        known: TierResult | None = None,
    ) -> None:
        self._tier = tier
        self._folder = folder
        self._data = data
        self._runner = runner
        self._device = device
        self._result_path = result_path
        self._known = known
        self._searches: dict[str, LrSearch] = {}
        self._suites: list[SuiteRuns] = []
        self._repeated = known.repeated if known else None

    def run(self) -> None:
        """Make all missing runs; the result file is written after each of them.

        Raises:
            StoppedError: time is up; the same call resumes.
            DasError: a run, a model or a corpus cannot be used.
        """
        bases = {name: self._build_base(name) for name in self._tier.bases}
        for suite in self._tier.suites:
            factory = RunFactory(self._tier, suite, self._folder, self._data, bases[suite.base])
            search = self._search(factory)
            if self._repeated is None:
                self._repeated = self._repeat_run(factory, search)
            runs = SuiteRuns(factory, search, self._runner, find_suite(self._known, suite), self._write)
            self._suites.append(runs)
            runs.run(self._device)
            self._write()

    def _build_base(self, name: BaseName) -> Path:
        folder = self._folder.parent / "base"
        cache = self._folder.parent / "cache"
        training = HeadTraining(epochs=self._tier.head_epochs)
        base = base_encoder(folder, self._data, cache, training, self._device)
        if name == "decoder":
            base = base_decoder(base)
        run = pretraining_run(self._tier, name, folder, self._data, cache, base)
        self._runner.run_alone(run)
        return run.model(0)

    def _search(self, factory: RunFactory) -> LrSearch:
        name = self._tier.search_name(factory.suite)
        if name not in self._searches:
            known = self._known.choices.get(name, []) if self._known else []
            self._searches[name] = LrSearch(factory, self._runner, known, self._write)
        return self._searches[name]

    def _repeat_run(self, factory: RunFactory, search: LrSearch) -> Repeated:
        """Make a run twice and compare the results."""
        variant = self._tier.variant(self._tier.repeated)
        search.run([variant])
        rate = self._tier.rates(variant)[0]
        first = factory.lr_search_run(variant, rate)
        again = factory.lr_search_run(variant, rate, again=True)
        self._runner.run([first, again])
        is_equal = reproducible_results(first.results()) == reproducible_results(again.results())
        return Repeated(label=variant.label, learning_rate=rate, is_equal=is_equal)

    def _write(self) -> None:
        choices = dict(self._known.choices) if self._known else {}
        strengths = dict(self._known.strengths) if self._known else {}
        # Known suites stay, also before their turn.
        suites = {suite.name: suite for suite in self._known.suites} if self._known else {}
        for name, search in self._searches.items():
            choices[name] = search.choices
            strengths[name] = search.strengths
        for runs in self._suites:
            if (suite := runs.result()) is not None:
                suites[suite.name] = suite
        result = TierResult(
            tier=self._tier.name,
            environment=describe(self._device),
            extended=self._extended(),
            settings=self._tier.recorded_settings,
            choices=choices,
            strengths=strengths,
            repeated=self._repeated,
            suites=list(suites.values()),
        )
        write_result_file(self._result_path, result)

    def _extended(self) -> list[Extended]:
        if self._known is None:
            return []
        difference = max((runs.difference for runs in self._suites if runs.difference is not None), default=0.0)
        return [*self._known.extended, Extended(environment=self._known.environment, difference=difference)]


def reproducible_results(results: Results) -> dict[str, Any]:
    """Everything in results that two runs of one config have in common."""
    return results.model_dump(mode="json", exclude=set(TIMED))
