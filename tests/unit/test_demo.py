"""The demo's configs, commands and context-free bounds."""

import dataclasses
import math
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from das_ds.config.io import load_config
from das_ds.errors import TrainingError
from helpers.run_folders import write_run
from launch import demo
from launch.demo_bounds import context_free_bounds
from launch.demo_corpora import CORPORA

ROOT = Path(__file__).parents[2]
DAS_CONFIG = demo.DEMOS["mlm"].das_config


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("objective", demo.DEMOS)
def test_configs_follow_the_corpora_and_each_other(objective: str) -> None:
    which = demo.DEMOS[objective]
    base, das = load_config(which.base_config), load_config(which.das_config)
    assert base.output_dir.parent == das.output_dir.parent == which.folder
    general, *domains = [corpus.name for corpus in CORPORA]
    assert [domain.name for domain in base.domains] == [general]
    assert [domain.name for domain in das.domains] == domains
    assert das.general is not None
    assert das.general.name == general
    assert das.model.name_or_path == str(base.output_dir / "domains" / f"00_{general}" / "model")
    assert das.data.sequence_length == base.data.sequence_length
    paths = [path for corpus in [*base.domains, *das.domains, das.general] for path in [*corpus.train, *corpus.valid]]
    assert all(Path(path).parent.parent == demo.CORPORA_FOLDER for path in paths)


def test_base_config_leaves_dropout_for_the_two_views_of_das() -> None:
    model = load_config(demo.DEMOS["mlm"].base_config).model.config
    assert model is not None
    assert max(model["hidden_dropout_prob"], model["attention_probs_dropout_prob"]) > 0


@pytest.mark.parametrize(
    ("num_gpus", "batch", "expected"), [(0, 64, 2), (1, 64, 1), (2, 64, 2), (6, 64, 4), (8, 64, 8), (16, 8, 8)]
)
def test_number_of_ranks(num_gpus: int, batch: int, expected: int) -> None:
    assert demo.num_ranks(num_gpus, batch) == expected


def test_command_splits_the_batch_and_names_the_ranks_only_where_needed() -> None:
    batch = load_config(DAS_CONFIG).train.global_batch_size
    on_cpu = demo.launch_command(DAS_CONFIG, ["method=ncl"], num_gpus=0, port=29501)
    on_gpus = demo.launch_command(DAS_CONFIG, [], num_gpus=4, port=29501)
    assert on_cpu[:5] == ["deepspeed", "--num_accelerators", "2", "--master_port", "29501"]
    assert on_cpu[-2:] == ["method=ncl", f"train.micro_batch_size={batch // 2}"]
    assert "--num_accelerators" not in on_gpus
    assert on_gpus[-1] == f"train.micro_batch_size={batch // 4}"


def test_failed_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "runner", lambda: [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(TrainingError, match=r"demo_das\.yaml ended with exit code 3, expected 0"):
        demo.run(DAS_CONFIG, [])


def test_comparison_shows_learning_beside_forgetting(tmp_path: Path) -> None:
    for name, shift in (("das", 0.0), ("ncl", -0.5), ("ncl_lower_rate", 0.25)):
        write_run(tmp_path / name, shift=shift)
    shown = demo.compare(dataclasses.replace(demo.DEMOS["mlm"], folder=tmp_path)).splitlines()
    rows = [line.split("  ")[0] for line in shown]
    assert rows.count("after pubmed") == 3
    summary = next(number for number, line in enumerate(shown) if "loss when learned" in line)
    columns, *groups = [re.split(r" {2,}", line) for line in (shown[summary], *shown[summary + 2 : summary + 5])]
    learned = columns.index("loss when learned")
    assert [(group[0], group[learned]) for group in groups] == [
        ("das", "3.5000"),
        ("ncl", "3.0000"),
        ("ncl 4e-4", "3.7500"),
    ]
    assert (tmp_path / "comparison" / "report.md").exists()


def test_earlier_runs_go_and_corpora_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("base", "das", "corpora"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    demo.remove_earlier_runs(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["corpora"]
    assert capsys.readouterr().out.count("left by an earlier demo") == 2


def test_main_turns_a_failure_into_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: demo.Demo) -> None:
        raise TrainingError("demo: no luck")

    monkeypatch.setattr(demo, "show", fail)
    assert demo.main(["clm"]) == 2
    assert capsys.readouterr().err == "das_ds: demo: no luck\n"


def test_threads_are_shared_out_unless_the_user_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(2)))
    assert demo.environment()["OMP_NUM_THREADS"] == "1"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert demo.environment()["OMP_NUM_THREADS"] == "4"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert demo.environment()["OMP_NUM_THREADS"] == "3"


def test_bounds_equal_sums_over_everything_that_can_stand_at_a_position() -> None:
    num_tokens = 5
    train, valid = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3]), torch.tensor([0, 1, 1, 3, 2, 4])
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
