"""Run groups: membership, labels and rejected combinations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from das_ds.errors import RunFolderError
from das_ds.reporting.group_runs import RunGroup, group_runs
from das_ds.reporting.load_runs import load_run
from helpers.run_folders import write_run

UNIT, PARAMETER = (
    {"name": "das", "view_dropout": 0.1, "importance": {"granularity": level}} for level in ("unit", "parameter")
)


def make_groups(folder: Path, *runs: dict[str, Any], labels: tuple[str, ...] = ()) -> list[RunGroup]:
    paths = [write_run(folder / str(number), **changes) for number, changes in enumerate(runs)]
    prefixes = [*labels, *[""] * (len(paths) - len(labels))]
    return group_runs([load_run(f"{prefix}{path}") for prefix, path in zip(prefixes, paths, strict=True)])


def test_group_runs_seed_and_mutable_keys_are_ignored(tmp_path: Path) -> None:
    (group,) = make_groups(
        tmp_path, {"seed": 2}, {"seed": 1, "wandb": {"mode": "disabled"}}, {"train": {"log_interval": 9}}
    )
    assert group.label == "ncl" and not group.settings and not group.mixed_keys
    assert [run.config.seed for run in group.runs] == [0, 1, 2]


def test_group_runs_method_keys_label_groups_of_that_method(tmp_path: Path) -> None:
    groups = make_groups(tmp_path, {}, {"train": {"learning_rate": 3e-4}}, {"method": UNIT}, {"method": PARAMETER})
    assert [group.label for group in groups] == [
        "ncl lr=0.01",
        "ncl lr=3e-4",
        "das lr=0.01 granularity=unit",
        "das lr=0.01 granularity=parameter",
    ]
    assert groups[3].settings == {"train.learning_rate": "0.01", "method.importance.granularity": "parameter"}
    assert groups[0].settings == {"train.learning_rate": "0.01"}


def test_group_runs_two_methods_are_labeled_by_name(tmp_path: Path) -> None:
    groups = make_groups(tmp_path, {}, {"method": PARAMETER})
    assert [group.label for group in groups] == ["ncl", "das"]
    assert groups[1].settings == {"method.importance.granularity": "parameter"}


def test_group_runs_ambiguous_keys_get_longer_names(tmp_path: Path) -> None:
    groups = make_groups(tmp_path, {"train": {"weight_decay": 0.0}}, {"corpus": {"text_column": "abstract"}})
    assert [group.label for group in groups] == [
        "ncl 0.text_column=text 1.text_column=text weight_decay=0",
        "ncl 0.text_column=abstract 1.text_column=abstract weight_decay=0.01",
    ]


def test_group_runs_one_label_for_different_runs_is_noted(tmp_path: Path) -> None:
    slower = {"seed": 1, "train": {"learning_rate": 1e-3}}
    (group,) = make_groups(tmp_path, {}, slower, labels=("mine=", " mine ="))
    assert group.label == "mine" and group.mixed_keys == ["train.learning_rate"]


def test_group_runs_label_splits_equal_runs(tmp_path: Path) -> None:
    first, second = make_groups(tmp_path, {}, {}, labels=("", "again="))
    assert (first.label, second.label) == ("ncl", "again") and not first.settings


def test_load_run_folder_with_equals_sign_has_no_label(tmp_path: Path) -> None:
    assert load_run(str(write_run(tmp_path / "lr=3"))).label is None


def test_group_runs_repeated_seed_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(
        RunFolderError, match=r"/1: found seed 0 of group 'ncl' again, after .*/0; each seed counts once"
    ):
        make_groups(tmp_path, {}, {})


def test_group_runs_label_collision_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"/1: found label 'ncl' again, after .*/0, whose config differs"):
        make_groups(tmp_path, {"method": PARAMETER}, {}, labels=("ncl=",))


@pytest.mark.parametrize("label", ["", " ", "a|b"])
def test_load_run_invalid_label_is_rejected(tmp_path: Path, label: str) -> None:
    with pytest.raises(RunFolderError, match="expected LABEL=RUN with a label"):
        load_run(f"{label}={tmp_path}")
