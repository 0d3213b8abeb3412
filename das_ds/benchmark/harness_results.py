"""Results of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), recorded like our own scores.

A file `results_<date>.json` has the metrics of one model. Where the harness was run with `--log_samples`, files
`samples_<task>_<date>.jsonl` next to it have a line per item, and with them items can be compared between models. Of a
group (such as mmlu) the group is recorded, not its tasks. Metrics that are no fraction of right items (perplexity,
bleu) are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from das_ds.benchmark.items import read_rows
from das_ds.benchmark.models import identify_weights
from das_ds.benchmark.scores import BenchmarkScores, Source, open_benchmarks, write_scores
from das_ds.config import RunConfig
from das_ds.errors import DataError, RunFolderError
from das_ds.models.run_models import RunModel
from das_ds.user_files import read_text

HARNESS: Source = "lm-evaluation-harness"
PREFERRED = ("acc_norm", "acc")
"""Metric by which a task is reported, the first that it has; else its own first one."""
NO_FILTER = "none"


def import_results(config: RunConfig, models: Sequence[RunModel], arguments: Sequence[str]) -> None:
    """Record results of the harness in the files of scores of the models that they are of.

    Args:
        config: of the run.
        models: of the run.
        arguments: `FILE`, which names its model, or `STAGE=FILE`.

    Raises:
        DataError: a file is missing, or not one of results.
        RunFolderError: its model is not of this run, or has other scores under the same name.
        ModelError: the model is not as exported.
    """
    for argument in arguments:
        stage, path = _split_argument(argument, models)
        results = _read_results(path)
        model = _find_model(models, stage, results, path)
        scores = open_benchmarks(model.scores_path, identify_weights(config, model), [])
        for task, task_scores in _read_scores(results, path):
            known = scores.tasks.get(task)
            if known is not None and known.source != HARNESS:
                raise RunFolderError(
                    f"{model.scores_path}: found scores of {task} by {known.source}, and in {path} by {HARNESS}; give "
                    "the task of benchmarks.tasks another name"
                )
            scores = scores.with_scores(task, task_scores)
        write_scores(scores, model.scores_path)


def _split_argument(argument: str, models: Sequence[RunModel]) -> tuple[str | None, Path]:
    stage, separator, path = argument.partition("=")
    # A path may contain the sign too.
    if separator and stage in [model.stage for model in models]:
        return stage, Path(path)
    return None, Path(argument)


def _read_results(path: Path) -> dict[str, Any]:
    try:
        results = json.loads(read_text(path))
    except OSError as error:
        raise DataError(f"--results {path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise DataError(f"--results {path}: not JSON ({error}), expected results of {HARNESS}") from error
    if not isinstance(results, dict) or not isinstance(results.get("results"), dict) or not results["results"]:
        raise DataError(f"--results {path}: found no results, expected a file results_<date>.json of {HARNESS}")
    return results


def _find_model(models: Sequence[RunModel], stage: str | None, results: Mapping[str, Any], path: Path) -> RunModel:
    name = _model_name(results)
    for model in models:
        if model.stage == stage or (stage is None and name is not None and _is_named(model, name)):
            return model
    raise RunFolderError(
        f"--results {path}: found results of {name or 'an unknown model'}, expected a model of this run; STAGE=FILE "
        f"says which, with one of {', '.join(model.stage for model in models) or 'no stage yet'}"
    )


def _model_name(results: Mapping[str, Any]) -> str | None:
    """The folder or hub name of the model."""
    arguments = results.get("config", {}).get("model_args")
    if isinstance(arguments, str):
        pairs = (part.partition("=") for part in arguments.split(","))
        arguments = {key.strip(): value for key, _, value in pairs}
    name = arguments.get("pretrained") if isinstance(arguments, dict) else None
    return name or results.get("model_name")


def _is_named(model: RunModel, name: str) -> bool:
    own = model.source.name_or_path
    return own is not None and (own == name or Path(own).resolve() == Path(name).resolve())


def _read_scores(results: Mapping[str, Any], path: Path) -> Iterator[tuple[str, BenchmarkScores]]:
    """Tasks that are in no group, and groups, with their scores."""
    groups: dict[str, list[str]] = {name: tasks for name, tasks in results.get("group_subtasks", {}).items() if tasks}
    members = {member for tasks in groups.values() for member in tasks}
    for task, values in results["results"].items():
        accuracy = _read_accuracy(results, task, values)
        if task in members or not accuracy:
            continue
        leaves = _list_leaves(task, groups)
        samples = [_read_samples(path, leaf) for leaf in leaves]
        items = [row for rows in samples for row in rows] if all(samples) else []
        sizes = [results.get("n-samples", {}).get(leaf, {}).get("effective") for leaf in leaves]
        num_items = sum(sizes) if all(sizes) else len(items)
        if not num_items:
            raise DataError(f"--results {path}: found no number of items of {task} (n-samples), expected one")
        chance, guessing = _chances(results, leaves, items)
        settings = {"items": num_items}
        for key, values_by_task in (("version", "versions"), ("n_shot", "n-shot"), ("task_hash", "task_hashes")):
            settings[key] = [results.get(values_by_task, {}).get(leaf) for leaf in leaves]
        yield (
            task,
            BenchmarkScores(
                source=HARNESS,
                settings=settings,
                num_items=num_items,
                chance=chance,
                guessing=guessing,
                rule=next((metric for metric in PREFERRED if metric in accuracy), next(iter(accuracy))),
                accuracy=accuracy,
                correct={metric: digits for metric in accuracy if len(digits := _digits(items, metric)) == num_items},
                bits_per_byte=None,
                num_truncated=0,
            ),
        )


def _read_accuracy(results: Mapping[str, Any], task: str, values: Mapping[str, Any]) -> dict[str, float]:
    """Metrics that are fractions of right items; `metric,filter` where another filter than none was applied."""
    higher_is_better = results.get("higher_is_better", {}).get(task, {})
    accuracy = {}
    for key, value in values.items():
        metric, _, filtered = key.partition(",")
        is_fraction = isinstance(value, int | float) and 0.0 <= value <= 1.0 and not metric.endswith("_stderr")
        if filtered and is_fraction and higher_is_better.get(metric, metric.startswith("acc")):
            accuracy[metric if filtered == NO_FILTER else key] = float(value)
    return accuracy


def _list_leaves(task: str, groups: Mapping[str, list[str]]) -> list[str]:
    if task not in groups:
        return [task]
    return [leaf for member in groups[task] for leaf in _list_leaves(member, groups)]


def _read_samples(path: Path, task: str) -> list[dict[str, Any]]:
    """The items of a task in the order of its documents; [] without a file of them."""
    date = path.stem.removeprefix("results_")
    samples = path.with_name(f"samples_{task}_{date}.jsonl")
    if not samples.is_file():
        return []
    rows = [row for row, _ in read_rows(samples)]
    return sorted(rows, key=lambda row: row.get("doc_id", 0))


def _digits(items: Sequence[Mapping[str, Any]], metric: str) -> str:
    """A digit per item, 1 where the model is right; "" where the items do not have the metric, or in fractions."""
    name, _, filtered = metric.partition(",")
    values = [item.get(name) for item in items if item.get("filter", NO_FILTER) == (filtered or NO_FILTER)]
    return "".join("1" if value else "0" for value in values) if all(value in (0, 1) for value in values) else ""


def _chances(
    results: Mapping[str, Any], leaves: Sequence[str], items: Sequence[Mapping[str, Any]]
) -> tuple[float | None, float | None]:
    """Means of 1 / K and 1 / (K - 1) over the items; 0 where there is nothing to choose from, None if K is unknown."""
    kinds = {results.get("configs", {}).get(leaf, {}).get("output_type") for leaf in leaves}
    if kinds and "multiple_choice" not in kinds and None not in kinds:
        return 0.0, 0.0
    if kinds != {"multiple_choice"} or not items:
        return None, None
    # With its mutual information, every choice is also asked for without context.
    num_choices = [
        len(item["arguments"]) // (2 if "acc_mutual_info" in item.get("metrics", ()) else 1) for item in items
    ]
    return (
        sum(1 / count for count in num_choices) / len(items),
        sum(1 / max(count - 1, 1) for count in num_choices) / len(items),
    )
