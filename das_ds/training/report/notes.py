"""What a comparison left out and what to mind, a sentence each."""

from __future__ import annotations

from collections.abc import Sequence

from das_ds.evaluation.comparison import Group
from das_ds.training.report.folder import ReadRun
from das_ds.training.report.groups import RunGroup


def notes_of(runs: Sequence[ReadRun], groups: Sequence[RunGroup], numbers: Sequence[Group]) -> list[str]:
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


def _unfinished(runs: Sequence[ReadRun]) -> list[str]:
    return [f"{run.name} is not complete and is left out." for run in runs if not run.results.complete]


def _mixed(groups: Sequence[RunGroup]) -> list[str]:
    return [
        f"Runs of {group.label} differ in more than the seed: {', '.join(group.mixed)}."
        for group in groups
        if group.mixed
    ]


def _versions(runs: Sequence[ReadRun]) -> list[str]:
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
