"""Runs that differ in their seed alone are one group, named by its method and by what tells it from the others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from das_ds.config_io import deciding_values
from das_ds.errors import RunFolderError
from das_ds.training.report.folder import ReadRun

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
    runs: list[ReadRun]
    """Sorted by seed."""
    mixed: list[str]
    """Keys besides the seed in which its own runs differ, where a label was given to different runs."""


def group_runs(runs: Sequence[ReadRun]) -> list[RunGroup]:
    """Groups in the order of their first runs.

    Raises:
        RunFolderError: two runs of one group have the same seed, or two groups would have one label.
    """
    values = {
        id(run): {key: value for key, value in deciding_values(run.config).items() if key != SEED} for run in runs
    }
    members: dict[str, list[ReadRun]] = {}
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
