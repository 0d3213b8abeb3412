"""Run groups: runs that differ only in their seed, named by their method and the settings in which groups differ.

`compare_runs` makes a comparison of them, after checking that they can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from das_ds.config.io import identity_values, method_defaults
from das_ds.errors import RunFolderError
from das_ds.reporting.comparison import Comparison, Group
from das_ds.reporting.load_runs import LoadedRun, summarize_run

METHOD_NAME = "method.name"
METHOD_KEYS = "method."
SEED = "seed"
SHORT_NAMES = {"train.learning_rate": "lr"}
"""Config key -> name in labels; other keys go by their last part."""

Values = Mapping[str, Any]
"""Dotted config key -> value."""


@dataclass(frozen=True)
class RunGroup:
    """Runs with one label."""

    label: str
    settings: dict[str, str]
    """Keys in which the groups differ -> this group's value as text."""
    runs: list[LoadedRun]
    """Sorted by seed."""
    mixed_keys: list[str]
    """Keys other than the seed in which its runs differ; only possible if a label was given to different runs."""


def compare_runs(runs: Sequence[LoadedRun], baseline: str | None = None) -> Comparison:
    """Compare runs; incomplete ones are omitted with a note.

    Args:
        runs: at least one.
        baseline: label of the group that all others are compared with; None: the first group.

    Raises:
        DasError: no run is complete, their corpora differ, seeds or labels collide, or a file is damaged.
    """
    complete = [run for run in runs if run.results.complete]
    if not complete:
        names = ", ".join(str(run.path) for run in runs)
        raise RunFolderError(f"report: found no complete run among {names}, expected at least one")
    _check_corpora(complete)
    run_groups = group_runs(complete)
    labels = [group.label for group in run_groups]
    if baseline is not None and baseline not in labels:
        raise RunFolderError(f"--baseline: found {baseline!r}, allowed: {', '.join(map(repr, labels))}")
    groups = [_summarize_group(group) for group in run_groups]
    return Comparison(
        domains=complete[0].results.domains,
        eval_domains=complete[0].results.eval_domains,
        groups=groups,
        reference=baseline or labels[0],
        notes=collect_notes(runs, run_groups, groups),
    )


def group_runs(runs: Sequence[LoadedRun]) -> list[RunGroup]:
    """Group runs by label or, without one, by config; groups are in the order of their first runs.

    Raises:
        RunFolderError: two runs of a group have the same seed, or two groups would have the same label.
    """
    configs = {
        id(run): {key: value for key, value in identity_values(run.config).items() if key != SEED} for run in runs
    }
    members: dict[str, list[LoadedRun]] = {}
    for run in runs:
        identity = repr(sorted(configs[id(run)].items())) if run.label is None else f"={run.label}"
        members.setdefault(identity, []).append(run)
    # The first run represents its group.
    group_configs = [configs[id(group[0])] for group in members.values()]
    differing = _differing_keys(group_configs)
    groups = []
    for group, config in zip(members.values(), group_configs, strict=True):
        groups.append(
            RunGroup(
                label=group[0].label or _build_label(config, differing, _differing_method_keys(group_configs, config)),
                settings={
                    key: _format_value(config.get(key))
                    for key in differing
                    if key != METHOD_NAME and _applies_to(config, key)
                },
                runs=sorted(group, key=lambda run: run.config.seed),
                mixed_keys=_differing_keys([configs[id(run)] for run in group]),
            )
        )
    _check_seeds_and_labels(groups)
    return groups


def collect_notes(runs: Sequence[LoadedRun], run_groups: Sequence[RunGroup], groups: Sequence[Group]) -> list[str]:
    """Omissions and warnings, one sentence each.

    Args:
        runs: all runs, incomplete ones included.
        run_groups: groups of the complete runs.
        groups: their summaries, in the same order.
    """
    return [
        *_note_incomplete(runs),
        *_note_mixed(run_groups),
        *_note_versions([run for group in run_groups for run in group.runs]),
        *_note_missing_metrics(groups),
        *_note_missing_importance(groups),
        *_note_missing_scores(groups),
    ]


def _check_corpora(runs: Sequence[LoadedRun]) -> None:
    first = runs[0]
    expected = first.results.eval_domains
    for run in runs[1:]:
        found = run.results.eval_domains
        if found != expected or run.results.domains != first.results.domains:
            differing = sorted(set(found) ^ set(expected))
            reason = f"only one of them has {', '.join(differing)}" if differing else "their order differs"
            raise RunFolderError(
                f"{run.path}: found corpora {', '.join(found)}, expected those of {first.path}: {', '.join(expected)} "
                f"({reason})"
            )


def _check_seeds_and_labels(groups: Sequence[RunGroup]) -> None:
    labels: dict[str, RunGroup] = {}
    for group in groups:
        # Runs are sorted by seed, so equal seeds are neighbors.
        for run, other in zip(group.runs, group.runs[1:], strict=False):
            if run.config.seed == other.config.seed:
                raise RunFolderError(
                    f"{other.path}: found seed {run.config.seed} of group {group.label!r} again, after {run.path}; "
                    "each seed counts once: omit one, or distinguish them with LABEL=RUN"
                )
        if group.label in labels:
            raise RunFolderError(
                f"{group.runs[0].path}: found label {group.label!r} again, after {labels[group.label].runs[0].path}, "
                "whose config differs; give all runs of one of them another label with LABEL=RUN"
            )
        labels[group.label] = group


def _summarize_group(group: RunGroup) -> Group:
    results = group.runs[0].results
    runs = [summarize_run(run) for run in group.runs]
    _check_equal(group, "stages", [run.results.stages for run in group.runs])
    _check_equal(group, "importance", [run.importance and run.importance.structure for run in runs])
    return Group(label=group.label, method=results.method, settings=group.settings, stages=results.stages, runs=runs)


def _check_equal(group: RunGroup, kind: str, values: Sequence[object]) -> None:
    """Runs with one label may differ, but not in the shape of the averaged values; a run without a value is ignored."""
    known = [(run, value) for run, value in zip(group.runs, values, strict=True) if value is not None]
    for run, value in known[1:]:
        first, expected = known[0]
        if value != expected:
            raise RunFolderError(
                f"{run.path}: found other {kind} than in {first.path}, so group {group.label!r} cannot be averaged; "
                "give one of them another LABEL"
            )


def _differing_keys(configs: Sequence[Values]) -> list[str]:
    """Keys in which configs differ; where a method lacks a key of another, its default is used."""
    defaults: dict[str, Any] = {}
    for config in configs:
        defaults = method_defaults(config[METHOD_NAME]) | defaults
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if len({repr(config.get(key, defaults.get(key))) for config in configs}) > 1]


def _applies_to(config: Values, key: str) -> bool:
    """Whether a key means something for a config: any key but those of other methods."""
    return key in config or not key.startswith(METHOD_KEYS)


def _differing_method_keys(configs: Sequence[Values], config: Values) -> list[str]:
    """Keys of the method's section in which the configs of this config's method differ."""
    same_method = [other for other in configs if other[METHOD_NAME] == config[METHOD_NAME]]
    return [key for key in _differing_keys(same_method) if key.startswith(METHOD_KEYS)]


def _build_label(config: Values, differing: Sequence[str], method_keys: Sequence[str]) -> str:
    """The method and the keys in which it differs; keys of one method's section mean nothing to another method."""
    keys = [key for key in differing if not key.startswith(METHOD_KEYS)] + list(method_keys)
    names = _shorten(keys)
    return " ".join([config[METHOD_NAME], *(f"{names[key]}={_format_value(config.get(key))}" for key in keys)])


def _shorten(keys: Sequence[str]) -> dict[str, str]:
    """Key -> its shortest suffix that no other key has."""
    names = {}
    for key in keys:
        parts = key.split(".")
        suffixes = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        others = [other for other in keys if other != key]
        unique = [suffix for suffix in suffixes if not any(f".{other}".endswith(f".{suffix}") for other in others)]
        names[key] = SHORT_NAMES.get(key, unique[0])
    return names


def _format_value(value: Any) -> str:
    """A config value as short text."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float) and math.isfinite(value):
        mantissa, exponent = f"{value:e}".split("e")
        scientific = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
        return min((f"{value:g}", scientific), key=len)
    # A pipe would end the cell of a Markdown table.
    return str(value).replace("|", "/")


def _note_incomplete(runs: Sequence[LoadedRun]) -> list[str]:
    return [f"{run.name} is not complete and is omitted." for run in runs if not run.results.complete]


def _note_mixed(groups: Sequence[RunGroup]) -> list[str]:
    return [
        f"Runs of {group.label} differ in more than the seed: {', '.join(group.mixed_keys)}."
        for group in groups
        if group.mixed_keys
    ]


def _note_versions(runs: Sequence[LoadedRun]) -> list[str]:
    versions: dict[str, dict[str, None]] = {}
    for run in runs:
        for package, version in run.results.versions.items():
            versions.setdefault(package, {})[version] = None
    return [f"Runs differ in {name}: {', '.join(several)}." for name, several in versions.items() if len(several) > 1]


def _note_missing_metrics(groups: Sequence[Group]) -> list[str]:
    runs = [run for group in groups for run in group.runs]
    return [
        f"{run.folder} has no metrics.jsonl: its speed and memory are omitted."
        for run in runs
        if run.cost.tokens_per_s is None
    ]


def _note_missing_importance(groups: Sequence[Group]) -> list[str]:
    """Only if other runs of the group have it: many methods measure none."""
    measured = [group for group in groups if any(run.importance is not None for run in group.runs)]
    missing = [run.folder for group in measured for run in group.runs if run.importance is None]
    return [
        f"{folder} has no importance files, unlike other runs of its group: it is omitted from means of importance."
        for folder in missing
    ]


def _note_missing_scores(groups: Sequence[Group]) -> list[str]:
    scores = [(run.folder, run.end_tasks) for group in groups for run in group.runs if run.end_tasks is not None]
    return [f"{folder}: {sentence}." for folder, run_scores in scores for sentence in run_scores.missing]
