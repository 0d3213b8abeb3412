"""Runs that differ in their seed alone are one group, named by its method and by what tells it from the others.

What a comparison left out and what to mind, a sentence each.

Run folders side by side, once it is sure that they can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from das_ds.config.io import identity_values
from das_ds.errors import RunFolderError
from das_ds.reporting.comparison import Comparison, Group
from das_ds.reporting.load_runs import LoadedRun, run_summary

METHOD_NAME, METHOD_KEYS, SEED = "method.name", "method.", "seed"
SHORT = {"train.learning_rate": "lr"}
"""Keys with a name of their own in labels; others go by their last part."""

Values = Mapping[str, Any]


@dataclass(frozen=True)
class RunGroup:
    """Runs of one label."""

    label: str
    settings: dict[str, str]
    """Keys in which the groups differ, with this one's values."""
    runs: list[LoadedRun]
    """Sorted by seed."""
    mixed: list[str]
    """Keys besides the seed in which its own runs differ, where a label was given to different runs."""


def group_runs(runs: Sequence[LoadedRun]) -> list[RunGroup]:
    """Groups in the order of their first runs.

    Raises:
        RunFolderError: two runs of one group have the same seed, or two groups would have one label.
    """
    values = {
        id(run): {key: value for key, value in identity_values(run.config).items() if key != SEED} for run in runs
    }
    members: dict[str, list[LoadedRun]] = {}
    for run in runs:
        identity = repr(sorted(values[id(run)].items())) if run.label is None else f"={run.label}"
        members.setdefault(identity, []).append(run)
    firsts = [values[id(group[0])] for group in members.values()]
    differing = _differing(firsts)
    groups = []
    for group, first in zip(members.values(), firsts, strict=True):
        label = group[0].label or _label(first, differing, _of_one_method(firsts, first))
        settings = {key: _shown(first.get(key)) for key in differing if key != METHOD_NAME}
        mixed = _differing([values[id(run)] for run in group])
        groups.append(RunGroup(label, settings, sorted(group, key=lambda run: run.config.seed), mixed))
    _check(groups)
    return groups


def _check(groups: Sequence[RunGroup]) -> None:
    labels: dict[str, RunGroup] = {}
    for group in groups:
        for run, other in zip(group.runs, group.runs[1:], strict=False):
            if run.config.seed == other.config.seed:
                raise RunFolderError(
                    f"{other.path}: found seed {run.config.seed} of group {group.label!r} again, after {run.path}; "
                    "each seed counts once: leave one out, or tell them apart with LABEL=RUN"
                )
        if group.label in labels:
            raise RunFolderError(
                f"{group.runs[0].path}: found label {group.label!r} again, after {labels[group.label].runs[0].path}, "
                "whose config differs; give all runs of one of them another with LABEL=RUN"
            )
        labels[group.label] = group


def _differing(configs: Sequence[Values]) -> list[str]:
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if len({repr(config.get(key)) for config in configs}) > 1]


def _of_one_method(configs: Sequence[Values], like: Values) -> list[str]:
    """Keys of the method's section in which configs of this method differ."""
    own = [config for config in configs if config[METHOD_NAME] == like[METHOD_NAME]]
    return [key for key in _differing(own) if key.startswith(METHOD_KEYS)]


def _label(values: Values, differing: Sequence[str], of_method: Sequence[str]) -> str:
    """The method, and every key that tells groups apart; keys of a method mean nothing to another."""
    keys = [key for key in differing if not key.startswith(METHOD_KEYS)] + list(of_method)
    names = _short_names(keys)
    return " ".join([values[METHOD_NAME], *(f"{names[key]}={_shown(values.get(key))}" for key in keys)])


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """Key -> the shortest end of it that no other key of these has."""
    names = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        alone = [end for end in ends if not any(other != key and f".{other}".endswith(f".{end}") for other in keys)]
        names[key] = SHORT.get(key, alone[0])
    return names


def _shown(value: Any) -> str:
    """A value as short text."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float) and math.isfinite(value):
        mantissa, exponent = f"{value:e}".split("e")
        short = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
        return min((f"{value:g}", short), key=len)
    # Tables are Markdown.
    return str(value).replace("|", "/")


def collect_warnings(runs: Sequence[LoadedRun], groups: Sequence[RunGroup], numbers: Sequence[Group]) -> list[str]:
    """All notes.

    Args:
        runs: all that were given.
        groups: what was made of those that are complete.
        numbers: the numbers of the groups.
    """
    return [
        *_unfinished(runs),
        *_mixed(groups),
        *_versions([run for group in groups for run in group.runs]),
        *_without_metrics(numbers),
        *_missing_importance(numbers),
        *_missing_scores(numbers),
    ]


def _unfinished(runs: Sequence[LoadedRun]) -> list[str]:
    return [f"{run.name} is not complete and is left out." for run in runs if not run.results.complete]


def _mixed(groups: Sequence[RunGroup]) -> list[str]:
    return [
        f"Runs of {group.label} differ in more than the seed: {', '.join(group.mixed)}."
        for group in groups
        if group.mixed
    ]


def _versions(runs: Sequence[LoadedRun]) -> list[str]:
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        for package, version in run.results.versions.items():
            found.setdefault(package, {})[version] = None
    return [f"Runs differ in {name}: {', '.join(versions)}." for name, versions in found.items() if len(versions) > 1]


def _without_metrics(groups: Sequence[Group]) -> list[str]:
    runs = [run for group in groups for run in group.runs]
    return [
        f"{run.folder} has no metrics.jsonl: its speed and memory are left out."
        for run in runs
        if run.cost.tokens_per_s is None
    ]


def _missing_importance(groups: Sequence[Group]) -> list[str]:
    """Only where others of the group have it: many methods measure none."""
    some = [group for group in groups if any(run.importance is not None for run in group.runs)]
    lacking = [run.folder for group in some for run in group.runs if run.importance is None]
    return [
        f"{folder} has no importance files, which others of its group have: it counts in no mean of importance."
        for folder in lacking
    ]


def _missing_scores(groups: Sequence[Group]) -> list[str]:
    scores = [(run.folder, run.end_tasks) for group in groups for run in group.runs if run.end_tasks is not None]
    return [f"{folder}: {sentence}." for folder, found in scores for sentence in found.missing]


def compare_runs(runs: Sequence[LoadedRun], against: str | None = None) -> Comparison:
    """Runs side by side; those that are not complete are left out, which a note says.

    Args:
        runs: at least one.
        against: label of the reference; None: the first group.

    Raises:
        DasError: none is complete, corpora, seeds or labels that do not fit, or a damaged file.
    """
    complete = [run for run in runs if run.results.complete]
    if not complete:
        names = ", ".join(str(run.path) for run in runs)
        raise RunFolderError(f"report: found no complete run among {names}, expected at least one")
    _check_corpora(complete)
    groups = group_runs(complete)
    labels = [group.label for group in groups]
    if against is not None and against not in labels:
        raise RunFolderError(f"--against: found {against!r}, allowed: {', '.join(map(repr, labels))}")
    numbers = [_group(group) for group in groups]
    return Comparison(
        domains=complete[0].results.domains,
        eval_domains=complete[0].results.eval_domains,
        groups=numbers,
        reference=against or labels[0],
        notes=collect_warnings(runs, groups, numbers),
    )


def _check_corpora(runs: Sequence[LoadedRun]) -> None:
    first, expected = runs[0], runs[0].results.eval_domains
    for run in runs[1:]:
        found = run.results.eval_domains
        if found != expected or run.results.domains != first.results.domains:
            differing = sorted(set(found) ^ set(expected))
            reason = f"only one of them has {', '.join(differing)}" if differing else "their order differs"
            raise RunFolderError(
                f"{run.path}: found corpora {', '.join(found)}, expected those of {first.path}: {', '.join(expected)} "
                f"({reason})"
            )


def _group(group: RunGroup) -> Group:
    first, numbers = group.runs[0], [run_summary(run) for run in group.runs]
    _check_alike(group, "stages", [run.results.stages for run in group.runs])
    _check_alike(group, "importance", [found.importance and found.importance.outline for found in numbers])
    return Group(
        label=group.label,
        method=first.results.method,
        settings=group.settings,
        stages=first.results.stages,
        runs=numbers,
    )


def _check_alike(group: RunGroup, kind: str, found: Sequence[object]) -> None:
    """Runs that were given one label may differ, but not in what a mean is taken of; None has no part in it."""
    there = [(run, one) for run, one in zip(group.runs, found, strict=True) if one is not None]
    for run, one in there[1:]:
        if one != there[0][1]:
            raise RunFolderError(
                f"{run.path}: found other {kind} than in {there[0][0].path}, of which no mean over group "
                f"{group.label!r} can be taken; give one of them another LABEL"
            )
