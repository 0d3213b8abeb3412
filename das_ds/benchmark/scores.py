"""benchmarks.json: the scores of one model on public benchmarks, typed and versioned; it grows task by task."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from das_ds.benchmark.benchmarks import Benchmark
from das_ds.benchmark.log_likelihood import ScoredItems
from das_ds.benchmark.rules import RULES, bits_per_byte, choose
from das_ds.errors import RunFolderError
from das_ds.storage import Section, VersionedJson
from das_ds.versions import library_versions

FORMAT_VERSION: Literal[1] = 1
Source = Literal["das_ds", "lm-evaluation-harness"]


class BenchmarkScores(Section):
    """The scores of a model on one benchmark."""

    source: Source = "das_ds"
    """What computed them."""
    settings: dict[str, Any]
    """Everything but the model that affects them; scores of two models are compared where it is the same."""
    num_items: int = Field(ge=1)
    chance: float | None
    """Expected accuracy of guessing, the mean of 1 / K over the items of K choices; 0 for a cloze, null if unknown."""
    guessing: float | None
    """Mean of 1 / (K - 1), see `rules.Transitions.adjusted`; 0 for a cloze, null if unknown."""
    rule: str
    """By which the accuracy is reported."""
    accuracy: dict[str, float]
    """Rule -> fraction of right items."""
    correct: dict[str, str]
    """Rule -> a digit per item in the order of the file, 1 where the model is right; empty if unknown."""
    bits_per_byte: float | None
    """Of the right choices, mean over the items; null if unknown."""
    num_truncated: int
    """Choices whose context was cut to what the model reads."""


class ModelBenchmarks(VersionedJson):
    """Scores of one model."""

    what: ClassVar[str] = "scores of benchmarks"
    format_version: Literal[1] = FORMAT_VERSION
    """Version of this format."""
    model: str
    """Checksum of the model's weights."""
    tasks: dict[str, BenchmarkScores] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=library_versions)
    """Versions of the libraries at the first start."""

    def with_scores(self, name: str, scores: BenchmarkScores) -> ModelBenchmarks:
        """A copy with the scores of one more benchmark."""
        return self.model_copy(update={"tasks": {**self.tasks, name: scores}})

    def with_rules(self, benchmarks: Sequence[Benchmark]) -> ModelBenchmarks:
        """A copy that reports benchmarks by the rules that the config now names; all rules were recorded."""
        changed = {
            benchmark.name: self.tasks[benchmark.name].model_copy(update={"rule": reported_rule(benchmark)})
            for benchmark in benchmarks
            if benchmark.name in self.tasks
        }
        return self.model_copy(update={"tasks": {**self.tasks, **changed}})


def reported_rule(benchmark: Benchmark) -> str:
    """The rule of a benchmark's reported accuracy; all tokens of a cloze must be the most probable ones."""
    return "greedy" if benchmark.is_cloze else benchmark.rule


def summarize_items(benchmark: Benchmark, scored: ScoredItems) -> BenchmarkScores:
    """The scores of a benchmark, from the probabilities of its choices."""
    correct: dict[str, str]
    if benchmark.is_cloze:
        correct = {"greedy": _digits(choices[0].is_greedy for choices in scored.items)}
    else:
        correct = {
            rule: _digits(
                choose(rule, choices) == item.answer
                for item, choices in zip(benchmark.items, scored.items, strict=True)
            )
            for rule in RULES
        }
    answers = [choices[item.answer] for item, choices in zip(benchmark.items, scored.items, strict=True)]
    return BenchmarkScores(
        settings=benchmark.settings,
        num_items=len(benchmark.items),
        chance=benchmark.chance,
        guessing=benchmark.guessing,
        rule=reported_rule(benchmark),
        accuracy={rule: digits.count("1") / len(digits) for rule, digits in correct.items()},
        correct=correct,
        bits_per_byte=statistics.fmean(bits_per_byte(answer) for answer in answers),
        num_truncated=scored.num_truncated,
    )


def open_benchmarks(path: Path, model: str, benchmarks: Sequence[Benchmark]) -> ModelBenchmarks:
    """Read a file of scores; empty scores if it does not exist.

    Args:
        path: of the file.
        model: checksum of the weights whose scores it has.
        benchmarks: that will be scored.

    Raises:
        RunFolderError: the file is damaged, of another model, or has a benchmark with other items.
    """
    if not path.exists():
        return ModelBenchmarks(model=model)
    scores = ModelBenchmarks.read(path)
    if scores.model != model:
        raise RunFolderError(f"{path}: found scores of other weights than the model's; move the file away")
    for benchmark in benchmarks:
        known = scores.tasks.get(benchmark.name)
        if known is not None and (known.source, known.settings) != ("das_ds", benchmark.settings):
            raise RunFolderError(
                f"{path}: benchmark {benchmark.name} was scored on other items ({known.source}: {known.settings}; now "
                f"{benchmark.settings}); use the same file and benchmarks.max_items, or move the file away"
            )
    return scores


def write_scores(scores: ModelBenchmarks, path: Path) -> None:
    """Write scores; the folder of the model before training may have to be made.

    Raises:
        RunFolderError: the folder cannot be written or is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"output_dir: cannot create {path.parent}: {error.strerror or error}") from error
    scores.write(path)


def _digits(values: Iterable[bool]) -> str:
    return "".join("1" if value else "0" for value in values)
