"""Run folders side by side, once it is sure that they can be compared."""

from __future__ import annotations

from collections.abc import Sequence

from das_ds.errors import RunFolderError
from das_ds.evaluation.comparison import Comparison, Group
from das_ds.training.report.folder import ReadRun, numbers_of
from das_ds.training.report.groups import RunGroup, group_runs
from das_ds.training.report.notes import notes_of


def compare_runs(runs: Sequence[ReadRun], against: str | None = None) -> Comparison:
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
        notes=notes_of(runs, groups, numbers),
    )


def _check_corpora(runs: Sequence[ReadRun]) -> None:
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
    first, numbers = group.runs[0], [numbers_of(run) for run in group.runs]
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
