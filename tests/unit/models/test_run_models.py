"""The models of a run that are scored, and which of them are missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from das_ds.config import RunConfig
from das_ds.models.run_models import list_run_models, say_which_are_missing
from helpers.runs import small_run


@pytest.mark.parametrize(
    ("exported", "expected"),
    [
        (["00_food", "01_papers"], ""),
        (["01_papers"], "left out, as their exported models are no longer there: food\n"),
        # Not trained yet.
        (["00_food"], ""),
        ([], ""),
    ],
)
def test_stages_whose_models_are_gone_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], exported: list[str], expected: str
) -> None:
    config = RunConfig(**small_run(tmp_path))
    assert config.stage_names == ["food", "papers"]
    for folder in exported:
        (Path(config.output_dir) / "domains" / folder / "model").mkdir(parents=True)
    say_which_are_missing(config, list_run_models(config, "scores.json"))
    assert capsys.readouterr().err == expected
