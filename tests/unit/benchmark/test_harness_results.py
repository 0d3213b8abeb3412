"""Results of lm-evaluation-harness, in the form that its version 0.4.13 writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from das_ds.benchmark.harness_results import import_results
from das_ds.benchmark.models import list_models
from das_ds.benchmark.scores import BenchmarkScores, ModelBenchmarks
from das_ds.config import RunConfig
from das_ds.errors import DasError, DataError, RunFolderError
from helpers.end_tasks import save_model

DATE = "2026-01-31T12-00-00.000000"


def run_config(folder: Path) -> RunConfig:
    """A run of which one export is there."""
    save_model(folder)
    return RunConfig.model_validate(
        {
            "output_dir": folder / "run",
            "model": {"config": {"model_type": "bert"}},
            "domains": [{"name": "food", "train": ["none.txt"]}],
        }
    )


def results_of(model: Path | str, **changes: Any) -> dict[str, Any]:
    """What the harness writes about a task of four items of multiple choice and a cloze of two."""
    return {
        "results": {
            "tiny": {
                "name": "tiny",
                "alias": "tiny",
                "sample_len": 4,
                "acc,none": 0.5,
                "acc_stderr,none": 0.25,
                "acc_norm,none": 0.75,
                "acc_norm_stderr,none": 0.25,
            },
            "words": {
                "alias": "words",
                "perplexity,none": 0.9,
                "acc,none": 1.0,
                "exact_match,strict-match": 0.5,
                "bleu,none": 31.5,
            },
        },
        "group_subtasks": {},
        "configs": {"tiny": {"output_type": "multiple_choice"}, "words": {"output_type": "loglikelihood"}},
        "versions": {"tiny": 1.0, "words": 2},
        "n-shot": {"tiny": 0, "words": 5},
        "higher_is_better": {
            "tiny": {"acc": True, "acc_norm": True},
            "words": {"perplexity": False, "acc": True, "exact_match": True, "bleu": True},
        },
        "n-samples": {"tiny": {"original": 4, "effective": 4}, "words": {"original": 2, "effective": 2}},
        "config": {"model": "hf", "model_args": {"pretrained": str(model), "dtype": "float32"}},
        "task_hashes": {"tiny": "hash"},
        "model_name": str(model),
        **changes,
    }


def samples(correct: str, num_choices: int = 2, **changes: Any) -> list[dict[str, Any]]:
    """Items of the harness; as its ranks may leave them, in another order than that of the documents."""
    arguments = {f"gen_args_{n}": {"arg_0": "a", "arg_1": " b"} for n in range(num_choices)}
    rows = [
        {"doc_id": n, "arguments": arguments, "filter": "none", "metrics": ["acc"], "acc": float(digit)} | changes
        for n, digit in enumerate(correct)
    ]
    return rows[1::2] + rows[::2]


def write_results(folder: Path, results: dict[str, Any], **items: list[dict[str, Any]]) -> Path:
    """Files of the harness."""
    folder.mkdir(exist_ok=True)
    for task, rows in items.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"samples_{task}_{DATE}.jsonl").write_text(text)
    path = folder / f"results_{DATE}.json"
    path.write_text(json.dumps(results))
    return path


def imported(config: RunConfig, *arguments: object) -> dict[str, BenchmarkScores]:
    """Scores of the export after the import."""
    models = list_models(config)
    import_results(config, models, [str(argument) for argument in arguments])
    return ModelBenchmarks.read(models[-1].scores_path).tasks


def export_of(config: RunConfig) -> Path:
    return config.output_dir / "domains" / "00_food" / "model"


def test_import_results_records_metrics_and_items(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    path = write_results(tmp_path / "out", results_of(export_of(config)), tiny=samples("1001"))
    scores = imported(config, path)
    tiny = scores["tiny"]
    assert tiny.source == "lm-evaluation-harness" and tiny.rule == "acc_norm"
    assert tiny.accuracy == {"acc": 0.5, "acc_norm": 0.75} and tiny.correct == {"acc": "1001"}
    assert (tiny.num_items, tiny.chance, tiny.guessing) == (4, 0.5, 1.0)
    assert tiny.settings == {"items": 4, "version": [1.0], "n_shot": [0], "task_hash": ["hash"]}
    # No fraction of right items: perplexity, bleu. Another filter is named.
    words = scores["words"]
    assert words.accuracy == {"acc": 1.0, "exact_match,strict-match": 0.5} and words.rule == "acc"
    assert (words.num_items, words.chance, words.guessing, words.correct) == (2, 0.0, 0.0, {})


def test_import_results_without_items_do_not_know_chance(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    path = write_results(tmp_path / "out", results_of(export_of(config)))
    tiny = imported(config, path)["tiny"]
    assert (tiny.chance, tiny.guessing, tiny.correct, tiny.num_items) == (None, None, {}, 4)


def test_import_results_mutual_information_asks_twice_for_each_choice(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    rows = samples("1001", num_choices=8, metrics=["acc", "acc_mutual_info"])
    tiny = imported(config, write_results(tmp_path / "out", results_of(export_of(config)), tiny=rows))["tiny"]
    assert (tiny.chance, tiny.guessing) == (0.25, pytest.approx(1 / 3))


def test_import_results_groups_replace_their_tasks(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    results = results_of(export_of(config))
    results["results"]["all"] = {"alias": "all", "acc,none": 0.5}
    results["group_subtasks"] = {"all": ["part"], "part": ["tiny", "other"], "tiny": []}
    for key in ("configs", "versions", "n-shot", "n-samples"):
        results[key]["other"] = results[key]["tiny"]
    path = write_results(tmp_path / "out", results, tiny=samples("1001"), other=samples("0110"))
    scores = imported(config, path)
    assert set(scores) == {"all", "words"}
    assert scores["all"].num_items == 8 and scores["all"].correct == {"acc": "10010110"}
    assert scores["all"].settings["version"] == [1.0, 1.0]


def test_import_results_finds_model_by_arguments_of_older_versions_and_by_stage(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    arguments = {"model_args": f"pretrained={export_of(config)},dtype=float"}
    older = write_results(tmp_path / "older", results_of("elsewhere", config=arguments))
    assert "tiny" in imported(config, older)
    results = results_of("elsewhere")
    results["results"] = {"late": results["results"]["tiny"]}
    results["higher_is_better"] = {}
    results["n-samples"] = {"late": {"effective": 4}}
    named = write_results(tmp_path / "a=b", results)
    assert set(imported(config, f"food={named}")) == {"tiny", "words", "late"}
    # Of the model with random weights that the run starts from.
    import_results(config, list_models(config), [f"base={named}"])
    assert set(ModelBenchmarks.read(tmp_path / "run" / "base" / "benchmarks.json").tasks) == {"late"}


@pytest.mark.parametrize(
    ("text", "error", "expected"),
    [
        (None, DataError, "cannot be read (No such file or directory)"),
        ("{", DataError, "not JSON ("),
        ("{}", DataError, "found no results, expected a file results_<date>.json of lm-evaluation-harness"),
        (
            json.dumps(results_of("elsewhere")),
            RunFolderError,
            "found results of elsewhere, expected a model of this run; STAGE=FILE says which, with one of base, food",
        ),
    ],
)
def test_import_results_wrong_file_raises(
    tmp_path: Path, text: str | None, error: type[DasError], expected: str
) -> None:
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(error) as caught:
        imported(run_config(tmp_path), path)
    assert str(caught.value).startswith(f"--results {path}: {expected}") and "\n" not in str(caught.value)


def test_import_results_without_number_of_items_raises(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    path = write_results(tmp_path / "out", results_of(export_of(config), **{"n-samples": {}}))
    with pytest.raises(DataError, match=r"found no number of items of tiny \(n-samples\), expected one"):
        imported(config, path)


def test_import_results_of_a_name_that_is_taken_raises(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    path = write_results(tmp_path / "out", results_of(export_of(config)))
    scores = imported(config, path)
    scores_path = list_models(config)[-1].scores_path
    recorded = ModelBenchmarks.read(scores_path)
    own = scores["tiny"].model_copy(update={"source": "das_ds"})
    recorded.with_scores("tiny", own).write(scores_path)
    expected = "found scores of tiny by das_ds, and in .* by lm-evaluation-harness; give the task"
    with pytest.raises(RunFolderError, match=expected):
        imported(config, path)
