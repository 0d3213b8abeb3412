"""A tier from its base models to its result file; called again, it goes on where it was broken off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.chaos.outcome import TIMED
from benchmarks.domains.base import HeadTraining, base_encoder
from benchmarks.domains.decoder import decoder_tokenizer
from benchmarks.domains.lr_search import Choice, choose
from benchmarks.domains.plan import BaseName, Tier, Values
from benchmarks.domains.pretraining import pretraining_run
from benchmarks.domains.result_file import Extended, Record, Repeated, write_result_file
from benchmarks.domains.resume_results import find_suite
from benchmarks.domains.runner import Runner
from benchmarks.domains.runs import Experiment
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
        device: of the base model's head, of groups, and of the result's name.
        result: the file to write.
        known: results of this tier whose runs are not made again.
    """

    def __init__(
        self,
        tier: Tier,
        folder: Path,
        data: Path,
        runner: Runner,
        device: torch.device,
        result: Path,
        known: Record | None = None,
    ) -> None:
        self._tier, self._folder, self._data, self._runner = tier, folder, data, runner
        self._device, self._result, self._known = device, result, known
        self._choices: dict[BaseName, dict[str, Choice]] = {}
        self._tracks: list[SuiteRuns] = []
        self._repeated = known.repeated if known else None

    def run(self) -> None:
        """Everything that is not done; the result file is written after each stage of a track.

        Raises:
            StoppedError: the time is up; the same call continues.
            DasError: a run, a model or a corpus that cannot be used.
        """
        bases = {name: self._base(name) for name in self._tier.bases}
        for track in self._tier.tracks:
            experiment = Experiment(self._tier, track, self._folder, self._data, bases[track.base])
            if track.base not in self._choices:
                before = self._known.choices.get(track.base, []) if self._known else []
                self._choices[track.base] = choose(experiment, self._tier.variants, self._runner, before)
            if self._repeated is None:
                self._repeated = self._repeat(experiment)
            runs = SuiteRuns(experiment, self._choices[track.base], self._runner, find_suite(self._known, track))
            self._tracks.append(runs)
            for stage in (runs.run_variants, runs.match_naive, lambda runs=runs: runs.restore_groups(self._device)):
                stage()
                self._write()
            if self._tier.task_variants:
                runs.fine_tune()
                self._write()

    def _base(self, name: BaseName) -> Path:
        folder, cache = self._folder.parent / "base", self._folder / "cache"
        start: Values
        if name == "encoder":
            head = base_encoder(folder, self._data, cache, HeadTraining(), self._device)
            start = {"model": {"name_or_path": str(head)}}
        else:
            start = {"data": {"tokenizer": str(decoder_tokenizer(folder, self._data))}}
        run = pretraining_run(self._tier, name, folder, self._data, cache, start)
        self._runner.run([run])
        return run.model(0)

    def _repeat(self, experiment: Experiment) -> Repeated:
        """Whether a run that is made twice gives the same numbers."""
        variant = self._tier.variant(self._tier.repeated)
        rate = self._tier.rates(variant)[0]
        again = experiment.lr_search_run(variant, rate, again=True)
        self._runner.run([again])
        first, second = (numbers(run.results()) for run in (experiment.lr_search_run(variant, rate), again))
        return Repeated(label=variant.label, learning_rate=rate, is_equal=first == second)

    def _write(self) -> None:
        record = Record(
            tier=self._tier.name,
            environment=describe(self._device),
            extended=self._extended(),
            settings=self._tier.settings,
            choices={base: list(choices.values()) for base, choices in self._choices.items()},
            repeated=self._repeated,
            tracks=[runs.record() for runs in self._tracks],
        )
        write_result_file(self._result, record)

    def _extended(self) -> list[Extended]:
        if self._known is None:
            return []
        difference = max((runs.difference for runs in self._tracks if runs.difference is not None), default=0.0)
        return [*self._known.extended, Extended(environment=self._known.environment, difference=difference)]


def numbers(results: Results) -> dict[str, Any]:
    """Everything in results that two runs of one config have in common."""
    return results.model_dump(mode="json", exclude=set(TIMED))
