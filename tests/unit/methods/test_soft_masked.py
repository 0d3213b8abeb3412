"""Default groups to mask, and groups that a model lacks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from das_ds.errors import ConfigError
from das_ds.methods import METHODS
from das_ds.models.architectures.registry import spec_for
from helpers.tiny_models import tiny_model
from helpers.training import run_config


def make_run(method: dict[str, Any], folder: Path) -> Any:
    """The part of a run that is read before training, over a model whose table has no heads."""
    layout = spec_for("roberta").layout(tiny_model())
    units = {group: size for group, size in layout.num_units.items() if group != "head"}
    return SimpleNamespace(config=run_config(folder, method=method), layout=replace(layout, num_units=units))


@pytest.mark.parametrize("method", [{"name": "dga"}, {"name": "das", "softmask": {"groups": ["output", "head"]}}])
def test_soft_masked_unknown_group_is_error(method: dict[str, Any], tmp_path: Path) -> None:
    message = (
        "method.softmask.groups: found head, which the roberta architecture spec has no units of; "
        "allowed: intermediate, output, unowned"
    )
    with pytest.raises(ConfigError, match=message):
        METHODS[method["name"]](make_run(method, tmp_path))


@pytest.mark.parametrize("groups", [None, ["output", "unowned"]])
def test_soft_masked_default_masks_existing_groups(groups: list[str] | None, tmp_path: Path) -> None:
    METHODS["das"](make_run({"name": "das", "softmask": {"groups": groups}}, tmp_path))
