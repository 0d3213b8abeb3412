"""The benchmark command: every model of a run, finished benchmarks are skipped, ranks do not matter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from das_ds.benchmark.models import identify_weights, list_models
from das_ds.benchmark.scores import BenchmarkScores, ModelBenchmarks
from das_ds.cli import main
from das_ds.config import RunConfig
from das_ds.config.io import dump_config
from das_ds.errors import ModelError, RunFolderError
from das_ds.reporting.benchmark_matrix import read_benchmark_matrix
from das_ds.run_dir import open_run_dir
from das_ds.storage import write_checksums
from helpers.benchmarks import (
    CLOZES,
    DATA,
    QUESTIONS,
    REQUESTS,
    benchmarks_alone,
    benchmarks_on_ranks,
    note_scored,
    plain_log_likelihood,
    write_items,
)
from helpers.commands import program
from helpers.run_ranks import run_ranks
from helpers.tiny_models import tiny_model
from helpers.tiny_tokenizer import tiny_tokenizer

STAGES = ("food", "papers")


def benchmark_run(folder: Path, tasks: list[str], model_type: str = "llama", **changes: Any) -> RunConfig:
    """A run of two domains, of which only the base model and the exports are there, with random weights."""
    tokenizer = tiny_tokenizer()
    models = [folder / "base", *(folder / "run" / "domains" / f"0{n}_{s}" / "model" for n, s in enumerate(STAGES))]
    for seed, model in enumerate(models):
        if not model.exists():
            # Some are less sure than others.
            scale = {"initializer_range": 0.05 + 0.05 * seed}
            network = tiny_model(model_type, seed=seed, vocab_size=len(tokenizer), max_position_embeddings=80, **scale)
            network.save_pretrained(model)
            tokenizer.save_pretrained(model)
    return RunConfig.model_validate(
        {
            "output_dir": folder / "run",
            "model": {"name_or_path": str(folder / "base")},
            "domains": [{"name": name, "train": ["none.txt"]} for name in STAGES],
            "benchmarks": {"tasks": tasks, "data": str(DATA), "batch_size": 3},
            "wandb": {"mode": "disabled"},
            **changes,
        }
    )


def own_tasks(folder: Path) -> list[str]:
    return [write_items(folder / "own.jsonl", QUESTIONS), write_items(folder / "words.jsonl", CLOZES)]


def scores_file(folder: Path, stage: int) -> Path:
    """Of the model before training (0), or after a domain."""
    names = ("base", *(f"domains/0{n}_{s}" for n, s in enumerate(STAGES)))
    return folder / "run" / names[stage] / "benchmarks.json"


@pytest.mark.multirank
@pytest.mark.parametrize("model_type", ["llama", "roberta"])
def test_run_benchmarks_two_ranks_equal_one(tmp_path: Path, model_type: str) -> None:
    own, words = own_tasks(tmp_path)
    config = benchmark_run(tmp_path, [REQUESTS, own, words], model_type)
    alone = benchmarks_alone(config)
    assert [list(scores.tasks) for scores in alone] == [[REQUESTS, "own", "words"]] * 3
    paths = [scores_file(tmp_path, stage) for stage in range(3)]
    assert [ModelBenchmarks.read(path) for path in paths] == alone
    # All of one model and one benchmark of another are to be scored again.
    paths[0].unlink()
    alone[2].model_copy(update={"tasks": {"own": alone[2].tasks["own"]}}).write(paths[2])
    for scores, scored in run_ranks(benchmarks_on_ranks, 2, config):
        assert [dict(model.tasks) for model in scores] == [dict(model.tasks) for model in alone]
        assert scored == [f"{REQUESTS}, base", "own, base", "words, base", f"{REQUESTS}, papers", "words, papers"]
    assert [ModelBenchmarks.read(path).tasks for path in paths] == [model.tasks for model in alone]


def test_run_benchmarks_scores_equal_plain_computation(tmp_path: Path) -> None:
    config = benchmark_run(tmp_path, own_tasks(tmp_path))
    scores = benchmarks_alone(config)
    tokenizer = tiny_tokenizer()
    for stage in range(3):
        model = tiny_model(
            "llama",
            seed=stage,
            vocab_size=len(tokenizer),
            max_position_embeddings=80,
            initializer_range=0.05 + 0.05 * stage,
        ).eval()
        right: dict[str, list[bool]] = {rule: [] for rule in ("acc", "acc_norm", "acc_per_token")}
        greedy = []
        bits = []
        for question in QUESTIONS:
            found = [
                plain_log_likelihood(model, tokenizer, question["context"], f" {choice}")
                for choice in question["choices"]
            ]
            sums = torch.tensor([value for value, _, _ in found], dtype=torch.float64)
            lengths = {
                "acc": torch.ones(len(found)),
                "acc_norm": torch.tensor([len(choice) for choice in question["choices"]]),
                "acc_per_token": torch.tensor([count for _, _, count in found]),
            }
            for rule, length in lengths.items():
                right[rule].append(int((sums / length).argmax()) == question["answer"])
            answer = question["answer"]
            greedy.append(found[answer][1])
            bits.append(-found[answer][0] / torch.log(torch.tensor(2.0)) / (1 + len(question["choices"][answer])))
        own = scores[stage].tasks["own"]
        for rule, values in right.items():
            assert own.correct[rule] == "".join("1" if value else "0" for value in values)
            assert own.accuracy[rule] == pytest.approx(sum(values) / len(values))
        assert own.bits_per_byte == pytest.approx(float(sum(bits) / len(bits)), rel=1e-4)
        assert (own.rule, own.num_items, own.chance) == ("acc", 4, pytest.approx(5 / 12))
        words = scores[stage].tasks["words"]
        assert words.rule == "greedy" and words.correct == {"greedy": "".join("1" if one else "0" for one in greedy)}
        assert words.bits_per_byte == pytest.approx(own.bits_per_byte)
    # Otherwise nothing above would tell rules and models apart.
    assert len({tuple(s.tasks["own"].correct.values()) for s in scores}) == 3
    assert any(s.tasks["own"].correct["acc"] != s.tasks["own"].correct["acc_norm"] for s in scores)


def test_run_benchmarks_skips_finished_pairs(tmp_path: Path) -> None:
    first, second = own_tasks(tmp_path)
    with note_scored() as scored:
        benchmarks_alone(benchmark_run(tmp_path, [first]))
        assert scored == ["own, base", "own, food", "own, papers"]
        benchmarks_alone(benchmark_run(tmp_path, [first, second]))
        assert scored[3:] == ["words, base", "words, food", "words, papers"]
        # Another rule is another look at what was recorded.
        changed = benchmark_run(tmp_path, [first], benchmarks={"tasks": [first], "rule": "acc_norm"})
        assert [model.tasks["own"].rule for model in benchmarks_alone(changed)] == ["acc_norm"] * 3
        assert len(scored) == 6


@pytest.mark.multirank
def test_benchmark_command_prints_and_reports(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    dump_config(benchmark_run(tmp_path, own_tasks(tmp_path)), config)
    report = tmp_path / "run" / "report" / "report.md"
    report.parent.mkdir()
    report.write_text("# ncl\n\n## Held-out loss\n\ntext\n\n## Cost and versions\n\nrows\n")
    done = program("launch/benchmark.py", "--config", config)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert " ".join(lines[0].split()) == "benchmark rule items chance before training after food after papers"
    assert [line.split()[0] for line in lines[2:]] == ["own", "words"]
    text = report.read_text()
    assert text.index("## Held-out loss") < text.index("## Benchmarks") < text.index("## Cost and versions")
    assert text.endswith("rows\n") and "| own       | acc    |     4 |  41.7% |" in text
    again = program("launch/benchmark.py", "--config", config, "--json")
    matrix = read_benchmark_matrix(tmp_path / "run")
    assert matrix is not None and json.loads(again.stdout) == matrix.summary
    assert report.read_text() == text


def test_benchmark_command_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    dump_config(benchmark_run(tmp_path, []), path)
    done = program("launch/benchmark.py", "--config", path)
    assert done.returncode == 2
    assert done.stderr.startswith("das_ds: benchmarks.tasks: found none") and done.stderr.count("\n") == 1
    capsys.readouterr()
    assert main(["benchmark", "--config", str(path), "benchmarks.rule=acc_max"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("das_ds: benchmarks.rule: found 'acc_max', allowed: acc |") and error.count("\n") == 1


def test_run_benchmarks_other_items_or_weights_raise(tmp_path: Path) -> None:
    tasks = own_tasks(tmp_path)[:1]
    benchmarks_alone(benchmark_run(tmp_path, tasks))
    fewer = benchmark_run(tmp_path, tasks, benchmarks={"tasks": tasks, "max_items": 2})
    expected = r"base/benchmarks\.json: benchmark own was scored on other items"
    with pytest.raises(RunFolderError, match=expected):
        benchmarks_alone(fewer)
    changed = tiny_model("llama", seed=9, vocab_size=len(tiny_tokenizer()), max_position_embeddings=80)
    changed.save_pretrained(tmp_path / "run" / "domains" / "00_food" / "model")
    expected = r"00_food/benchmarks\.json: found scores of other weights than the model's"
    with pytest.raises(RunFolderError, match=expected):
        benchmarks_alone(benchmark_run(tmp_path, tasks))


def test_run_benchmarks_modified_export_raises(tmp_path: Path) -> None:
    config = benchmark_run(tmp_path, own_tasks(tmp_path))
    model = tmp_path / "run" / "domains" / "00_food" / "model"
    write_checksums(model)
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    with pytest.raises(ModelError, match=r"config\.json missing or not as exported"):
        benchmarks_alone(config)


def test_run_benchmarks_uncreatable_folder_raises(tmp_path: Path) -> None:
    config = benchmark_run(tmp_path, own_tasks(tmp_path))
    (tmp_path / "run" / "base").touch()
    with pytest.raises(RunFolderError, match=r"output_dir: cannot create .*run/base: File exists"):
        benchmarks_alone(config)


def test_run_benchmarks_before_training_does_not_block_the_run(tmp_path: Path) -> None:
    config = benchmark_run(tmp_path / "other", own_tasks(tmp_path))
    config = config.model_copy(update={"output_dir": tmp_path / "run"})
    scores = benchmarks_alone(config)
    assert len(scores) == 1
    assert open_run_dir(config).root == tmp_path / "run"


def test_list_models_leaves_out_what_is_in_no_file(tmp_path: Path) -> None:
    config = benchmark_run(tmp_path, [])
    assert [model.stage for model in list_models(config)] == ["base", "food", "papers"]
    warmed = config.model.model_copy(update={"head_warmup_steps": 3})
    assert [m.stage for m in list_models(config.model_copy(update={"model": warmed}))] == ["food", "papers"]


def test_identify_weights_is_the_same_with_and_without_recorded_checksums(tmp_path: Path) -> None:
    config = benchmark_run(tmp_path, [])
    base, food, papers = list_models(config)
    plain = identify_weights(config, food)
    write_checksums(Path(str(food.source.name_or_path)))
    assert identify_weights(config, food) == plain
    assert len({plain, identify_weights(config, base), identify_weights(config, papers)}) == 3


def test_random_base_is_identified_by_config_and_seed(tmp_path: Path) -> None:
    values = {"model": {"config": {"model_type": "llama"}}}
    config = benchmark_run(tmp_path, [], **values)
    base = list_models(config)[0]
    other = config.model_copy(update={"seed": 1})
    assert identify_weights(config, base) == identify_weights(config, base) != identify_weights(other, base)


def test_scores_are_written_and_read(tmp_path: Path) -> None:
    scores = BenchmarkScores(
        settings={"file": "a"},
        num_items=2,
        chance=0.5,
        guessing=1.0,
        rule="acc",
        accuracy={"acc": 0.5},
        correct={"acc": "01"},
        bits_per_byte=1.25,
        num_truncated=0,
    )
    recorded = ModelBenchmarks(model="digest").with_scores("own", scores)
    recorded.write(tmp_path / "benchmarks.json")
    assert ModelBenchmarks.read(tmp_path / "benchmarks.json") == recorded
