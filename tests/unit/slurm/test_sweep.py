"""The elements of a sweep: which runs there are, that each is a config, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from das_ds.config import RunConfig
from das_ds.config.io import load_config
from das_ds.slurm import sweep
from das_ds.slurm.sweep import sweep_overrides
from helpers.commands import write_config
from helpers.runs import small_run


def test_elements_are_the_product_and_each_is_a_run_of_its_own(tmp_path: Path) -> None:
    path = write_config(tmp_path, small_run(tmp_path))
    elements = sweep_overrides(load_config(path), "das,ncl", "0,7", "food,papers:papers,food")
    runs = [load_config(path, overrides) for overrides in elements]
    expected = [(m, s, o) for m in ("das", "ncl") for s in (0, 7) for o in (("food", "papers"), ("papers", "food"))]
    assert [(run.method.name, run.seed, tuple(domain.name for domain in run.domains)) for run in runs] == expected
    assert len({run.output_dir for run in runs}) == 8
    assert runs[3].output_dir == tmp_path / "run" / "das-seed7-papers+food"
    texts = {domain.name: domain.train for domain in load_config(path).domains}
    assert all(domain.train == texts[domain.name] for run in runs for domain in run.domains)


def test_other_methods_keep_the_settings_that_they_share(tmp_path: Path) -> None:
    method = {"name": "das", "importance": {"num_samples": 7}, "merge": {"weight": 0.25}, "replay": {"fraction": 0.25}}
    path = write_config(tmp_path, small_run(tmp_path, method=method))
    elements = sweep_overrides(load_config(path), "das,dga,ncl,derpp", "", "")
    das, dga, *others = [load_config(path, overrides).method for overrides in elements]
    assert das == load_config(path).method
    assert dga.model_dump(exclude={"name"}) == das.model_dump(exclude={"name"})
    assert all(other.merge == das.merge and other.replay == das.replay for other in others)


def test_without_axes_there_is_the_config_itself(tmp_path: Path) -> None:
    config = RunConfig(**small_run(tmp_path, seed=3))
    path = write_config(tmp_path, small_run(tmp_path, seed=3))
    (overrides,) = sweep_overrides(config, "", "", "")
    assert load_config(path, overrides) == config.model_copy(
        update={"output_dir": tmp_path / "run" / "das-seed3-food+papers"}
    )


def test_arguments_keep_the_overrides_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, small_run(tmp_path))
    words = ("--element", 1, "--seeds", "0,1", "--config", path, "train.steps_per_domain=9")
    assert run_sweep(monkeypatch, *words) == 0
    arguments = capsys.readouterr().out.splitlines()
    assert arguments[:2] == ["--config", str(path)]
    run = load_config(path, arguments[2:])
    assert run.seed == 1 and run.train.steps_per_domain == 9


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0,1,0"], "seeds: found 0 more than once"),
        (["--orders", "food"], "orders: found 'food', expected all of food, papers, each once"),
        (["--orders", "food,books"], "orders: found 'food,books', expected all of food, papers, each once"),
        (["--methods", "das,dsa"], "method.name"),
        (["--seeds", "one"], "seed"),
        (
            ["--element", "2", "--seeds", "0,1"],
            "--array: found element 2, but there are 2; allowed: ",
        ),
    ],
)
def test_wrong_axes_are_exit_code_2_and_one_line(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_config(tmp_path, small_run(tmp_path))
    assert run_sweep(monkeypatch, "--element", 0, *words, "--config", path) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and error.startswith("das_ds: ") and message in error


def run_sweep(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """`python -m das_ds.slurm.sweep WORDS` in this process."""
    monkeypatch.setattr("sys.argv", ["sweep", *map(str, words)])
    return sweep.main()
