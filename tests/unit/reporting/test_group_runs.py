"""Which runs are one group, and what groups are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from das_ds.errors import RunFolderError
from das_ds.reporting.group_runs import RunGroup, group_runs
from das_ds.reporting.load_runs import read_run
from helpers.run_folders import write_run

UNIT, PARAMETER = ({"name": "das", "importance": {"granularity": level}} for level in ("unit", "parameter"))


def groups_of(folder: Path, *runs: dict[str, Any], labels: tuple[str, ...] = ()) -> list[RunGroup]:
    paths = [write_run(folder / str(number), **changes) for number, changes in enumerate(runs)]
    prefixes = [*labels, *[""] * (len(paths) - len(labels))]
    return group_runs([read_run(f"{prefix}{path}") for prefix, path in zip(prefixes, paths, strict=True)])


def test_seed_and_keys_that_decide_nothing_make_no_group(tmp_path: Path) -> None:
    (group,) = groups_of(
        tmp_path, {"seed": 2}, {"seed": 1, "wandb": {"mode": "disabled"}}, {"train": {"log_interval": 9}}
    )
    assert group.label == "ncl" and not group.settings and not group.mixed
    assert [run.config.seed for run in group.runs] == [0, 1, 2]


def test_keys_of_a_method_tell_its_own_groups_apart_and_other_keys_all(tmp_path: Path) -> None:
    groups = groups_of(tmp_path, {}, {"train": {"learning_rate": 3e-4}}, {"method": UNIT}, {"method": PARAMETER})
    assert [group.label for group in groups] == [
        "ncl lr=0.01",
        "ncl lr=3e-4",
        "das lr=0.01 granularity=unit",
        "das lr=0.01 granularity=parameter",
    ]
    assert groups[3].settings == {"train.learning_rate": "0.01", "method.importance.granularity": "parameter"}
    assert groups[0].settings["method.importance.granularity"] == "unit"


def test_what_distinguishes_one_method_from_another_is_its_name(tmp_path: Path) -> None:
    groups = groups_of(tmp_path, {}, {"method": PARAMETER})
    assert [group.label for group in groups] == ["ncl", "das"]
    assert groups[1].settings == {"method.importance.granularity": "parameter"}


def test_keys_with_the_same_end_are_told_apart(tmp_path: Path) -> None:
    groups = groups_of(tmp_path, {"train": {"weight_decay": 0.0}}, {"corpus": {"text_column": "abstract"}})
    assert [group.label for group in groups] == [
        "ncl 0.text_column=text 1.text_column=text weight_decay=0",
        "ncl 0.text_column=abstract 1.text_column=abstract weight_decay=0.01",
    ]


def test_a_label_makes_one_group_of_different_runs_and_says_so(tmp_path: Path) -> None:
    slower = {"seed": 1, "train": {"learning_rate": 1e-3}}
    (group,) = groups_of(tmp_path, {}, slower, labels=("mine=", " mine ="))
    assert group.label == "mine" and group.mixed == ["train.learning_rate"]


def test_a_label_tells_equal_runs_apart(tmp_path: Path) -> None:
    first, second = groups_of(tmp_path, {}, {}, labels=("", "again="))
    assert (first.label, second.label) == ("ncl", "again") and not first.settings


def test_a_folder_may_have_an_equals_sign(tmp_path: Path) -> None:
    assert read_run(str(write_run(tmp_path / "lr=3"))).label is None


def test_a_seed_counts_once(tmp_path: Path) -> None:
    with pytest.raises(
        RunFolderError, match=r"/1: found seed 0 of group 'ncl' again, after .*/0; each seed counts once"
    ):
        groups_of(tmp_path, {}, {})


def test_a_label_that_another_group_has_already(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"/1: found label 'ncl' again, after .*/0, whose config differs"):
        groups_of(tmp_path, {"method": PARAMETER}, {}, labels=("ncl=",))


@pytest.mark.parametrize("label", ["", " ", "a|b"])
def test_labels_that_no_table_can_hold(tmp_path: Path, label: str) -> None:
    with pytest.raises(RunFolderError, match="expected LABEL=RUN with a label"):
        read_run(f"{label}={tmp_path}")
