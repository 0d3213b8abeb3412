"""The demo's configs, commands and context-free bounds."""

import dataclasses
import math
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from das_ds.config.io import load_config
from das_ds.errors import TrainingError
from helpers.run_folders import write_run
from launch import demo
from launch.demo_bounds import context_free_bounds
from launch.demo_corpora import CORPORA

ROOT = Path(__file__).parents[2]
CONFIG = demo.DEMOS["mlm"].config


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("objective", demo.DEMOS)
def test_configs_match_the_corpora_and_each_other(objective: str) -> None:
    which = demo.DEMOS[objective]
    base = load_config(which.base_config)
    continued = load_config(which.config)
    assert base.output_dir == which.folder / demo.BASE_RUN
    assert continued.output_dir == which.folder / demo.PROTECTED
    general, *domains = [corpus.name for corpus in CORPORA]
    assert [domain.name for domain in base.domains] == [general]
    assert [domain.name for domain in continued.domains] == domains
    assert continued.general is not None
    assert continued.general.name == general
    assert continued.model.name_or_path == str(base.output_dir / "domains" / f"00_{general}" / "model")
    assert continued.data.sequence_length == base.data.sequence_length
    paths = [
        path
        for corpus in [*base.domains, *continued.domains, continued.general]
        for path in [*corpus.train, *corpus.valid]
    ]
    assert all(Path(path).parent.parent == demo.CORPORA_FOLDER for path in paths)


@pytest.mark.parametrize("objective", demo.DEMOS)
def test_runs_have_valid_overrides_and_differ_in_method_and_rate(objective: str) -> None:
    which = demo.DEMOS[objective]
    configs = [load_config(which.config, [*run.overrides]) for run in which.runs]
    rate = configs[0].train.learning_rate
    assert [config.method.name for config in configs] == ["directions", "das", "ncl", "ncl"]
    assert [config.train.learning_rate for config in configs] == [rate] * 3 + [float(which.matched_rate)]
    assert [run.label for run in which.runs] == ["directions", "das", "ncl", which.matched_label]


def test_base_config_has_dropout_for_the_views_of_das() -> None:
    model = load_config(demo.DEMOS["mlm"].base_config).model.config
    assert model is not None
    assert model["attention_dropout"] > 0


@pytest.mark.parametrize(
    ("num_gpus", "batch", "expected"), [(0, 64, 2), (1, 64, 1), (2, 64, 2), (6, 64, 4), (8, 64, 8), (16, 8, 8)]
)
def test_num_ranks(num_gpus: int, batch: int, expected: int) -> None:
    assert demo.num_ranks(num_gpus, batch) == expected


def test_launch_command_splits_the_batch_over_the_ranks() -> None:
    batch = load_config(CONFIG).train.global_batch_size
    on_cpu = demo.launch_command(CONFIG, ["method=ncl"], num_gpus=0, port=29501)
    on_gpus = demo.launch_command(CONFIG, [], num_gpus=4, port=29501)
    assert on_cpu[:5] == ["deepspeed", "--num_accelerators", "2", "--master_port", "29501"]
    assert on_cpu[-2:] == ["method=ncl", f"train.micro_batch_size={batch // 2}"]
    assert "--num_accelerators" not in on_gpus
    assert on_gpus[-1] == f"train.micro_batch_size={batch // 4}"


def test_train_raises_when_a_run_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "runner", lambda: [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(TrainingError, match=r"demo\.yaml ended with exit code 3, expected 0"):
        demo.train(CONFIG, [])


def test_compare_shows_learning_next_to_forgetting(tmp_path: Path) -> None:
    which = dataclasses.replace(demo.DEMOS["mlm"], folder=tmp_path)
    for run, shift in zip(which.runs, (0.0, 0.125, -0.5, 0.25), strict=True):
        write_run(tmp_path / run.name, shift=shift)
    lines = demo.compare(which).splitlines()
    labels = [line.split("  ")[0] for line in lines]
    assert labels.count("after pubmed") == 4
    assert labels[2:6] == [run.label for run in which.runs]
    columns, *groups = [re.split(r" {2,}", line) for line in (lines[0], *lines[2:6])]
    assert [group[2] for group in groups] == ["3.5000", "3.6250", "3.0000", "3.7500"], columns
    assert lines[7].startswith("directions against ncl 9e-4: loss on new domains 3.00 against 3.25; forgets 0% more")
    assert (tmp_path / "comparison" / "report.md").exists()


def _group(*, learned: float, forgetting: float) -> SimpleNamespace:
    run = SimpleNamespace(loss_after_learning_later=learned, forgetting=forgetting, final_loss=learned + forgetting / 2)
    return SimpleNamespace(runs=[run])


@pytest.mark.parametrize(("matched_forgetting", "expected"), [(1.0, "40% less: "), (0.5, "20% more: "), (-0.25, "")])
def test_verdict_names_who_learned_and_who_forgot(matched_forgetting: float, expected: str) -> None:
    groups = {
        "directions": _group(learned=3.5, forgetting=0.6),
        "ncl 4e-4": _group(learned=3.25, forgetting=matched_forgetting),
    }
    comparison: Any = SimpleNamespace(group=groups.__getitem__)
    assert demo.verdict(comparison, "ncl 4e-4") == (
        f"directions against ncl 4e-4: loss on new domains 3.50 against 3.25; forgets {expected}"
        f"0.60 against {matched_forgetting:.2f}; final loss 3.80 against {3.25 + matched_forgetting / 2:.2f}"
    )


def test_remove_earlier_runs_keeps_the_corpora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("base", "das", "corpora"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    demo.remove_earlier_runs(dataclasses.replace(demo.DEMOS["mlm"], folder=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["corpora"]
    assert capsys.readouterr().out.count("left by an earlier demo") == 2


def test_main_prints_a_failure_as_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: demo.Demo) -> None:
        raise TrainingError("demo: no luck")

    monkeypatch.setattr(demo, "show", fail)
    assert demo.main(["clm"]) == 2
    assert capsys.readouterr().err == "das_ds: demo: no luck\n"


def test_environment_divides_threads_unless_the_user_sets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(2)))
    assert demo.environment()["OMP_NUM_THREADS"] == "1"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert demo.environment()["OMP_NUM_THREADS"] == "4"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert demo.environment()["OMP_NUM_THREADS"] == "3"


def test_context_free_bounds_equal_sums_over_all_tokens_of_a_position() -> None:
    num_tokens = 5
    train = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])
    valid = torch.tensor([0, 1, 1, 3, 2, 4])
    bounds = context_free_bounds(train, valid, num_tokens)
    p = [(train.tolist().count(token) + 0.5) / (len(train) + 0.5 * num_tokens) for token in range(num_tokens)]

    def loss(seen: int | None, true: int) -> float:
        """Bayes' rule: P(true | seen) with the prior p and 80/10/10 corruption."""
        joint = [
            p[token] * (0.8 if seen is None else 0.1 / num_tokens + (0.1 if token == seen else 0.0))
            for token in range(num_tokens)
        ]
        return -math.log(joint[true] / sum(joint))

    expected = 0.0
    for true in valid.tolist():
        by_chance = sum(loss(seen, true) for seen in range(num_tokens)) / num_tokens
        expected += (0.8 * loss(None, true) + 0.1 * loss(true, true) + 0.1 * by_chance) / len(valid)
    assert bounds.context_free == pytest.approx(expected, rel=1e-12)
    assert bounds.unigram == pytest.approx(-sum(math.log(p[token]) for token in valid.tolist()) / len(valid), rel=1e-12)
    assert bounds.context_free < bounds.unigram
