"""end_tasks.json: summaries over seeds, growth, and files that do not match."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from das_ds.config import TaskConfig
from das_ds.downstream.scores import (
    EndTaskScores,
    Scores,
    SeedScores,
    build_score_table,
    mean_scores,
    open_scores,
    summarize_scores,
)
from das_ds.downstream.tasks import EndTask, read_task
from das_ds.errors import RunFolderError
from das_ds.run_dir import END_TASKS_FILE
from das_ds.storage import write_json_with_checksum
from helpers.end_tasks import small_task


def seed_scores(seed: int, dev: float, test: float) -> SeedScores:
    return SeedScores(
        seed=seed,
        epochs=3,
        best_epoch=2,
        dev=Scores(accuracy=dev, macro_f1=dev / 2, micro_f1=dev),
        test=Scores(accuracy=test, macro_f1=test / 2, micro_f1=test),
    )


def make_task(folder: Path, **changes: object) -> EndTask:
    return read_task(TaskConfig(**small_task(folder, metric="accuracy", **changes)))


def two_seeds(folder: Path) -> EndTaskScores:
    task = make_task(folder)
    scores = EndTaskScores(model="abc").with_seed(task, seed_scores(4, 0.5, 0.25))
    return scores.with_seed(task, seed_scores(1, 1.0, 0.75))


def test_with_seed_sorts_and_summarizes_reported_metric(tmp_path: Path) -> None:
    one = EndTaskScores(model="abc").with_seed(make_task(tmp_path), seed_scores(0, 0.5, 0.25))
    assert one.tasks["toy_text"].test.model_dump() == {"mean": 0.25, "deviation": None}
    scores = two_seeds(tmp_path)
    entry = scores.tasks["toy_text"]
    assert [done.seed for done in entry.seeds] == [1, 4]
    assert (entry.metric, entry.labels) == ("accuracy", ["food", "papers"])
    assert (entry.dev.mean, entry.test.mean) == (0.75, 0.5)
    assert entry.test.deviation == pytest.approx(statistics.stdev([0.25, 0.75]))
    assert scores.has("toy_text", 4) and not scores.has("toy_text", 0) and not scores.has("other", 4)
    summary = summarize_scores(scores, [make_task(tmp_path).config])["toy_text"]
    assert (summary["metric"], summary["seeds"], summary["test"]["mean"]) == ("accuracy", 2, 0.5)


def test_mean_scores_and_score_table_for_tracker(tmp_path: Path) -> None:
    scores = two_seeds(tmp_path)
    assert mean_scores(scores) == {"end_task/toy_text/dev": 0.75, "end_task/toy_text/test": 0.5}
    columns, rows = build_score_table(scores)
    assert columns == ["task", "seed", "metric", "dev", "test", "best_epoch"]
    assert rows == [["toy_text", 1, "accuracy", 1.0, 0.75, 2], ["toy_text", 4, "accuracy", 0.5, 0.25, 2]]


def test_open_scores_round_trip(tmp_path: Path) -> None:
    path = tmp_path / END_TASKS_FILE
    scores = two_seeds(tmp_path)
    scores.write(path)
    assert EndTaskScores.read(path) == open_scores(path, "abc", [make_task(tmp_path)]) == scores
    # Seeds may be added, and files may move as long as their content stays.
    (tmp_path / "moved").mkdir()
    assert open_scores(path, "abc", [make_task(tmp_path / "moved", seeds=[1, 2, 3])]) == scores


def test_open_scores_missing_file_or_folder(tmp_path: Path) -> None:
    assert open_scores(tmp_path / END_TASKS_FILE, "abc", []).tasks == {}
    with pytest.raises(RunFolderError, match=r"found no folder .*none, expected one to write scores to"):
        open_scores(tmp_path / "none" / END_TASKS_FILE, "abc", [])
    with pytest.raises(RunFolderError, match=r"end_tasks\.json: cannot be written \(No such file"):
        EndTaskScores(model="abc").write(tmp_path / "none" / END_TASKS_FILE)


def test_open_scores_other_weights_or_settings_raise(tmp_path: Path) -> None:
    path = tmp_path / END_TASKS_FILE
    two_seeds(tmp_path).write(path)
    with pytest.raises(RunFolderError, match="found scores of other weights than the model's"):
        open_scores(path, "abd", [])
    with pytest.raises(
        RunFolderError, match=r"toy_text was scored with other settings \(learning_rate: was 0\.003, now 0\.5\)"
    ):
        open_scores(path, "abc", [make_task(tmp_path, learning_rate=0.5)])
    task = make_task(tmp_path)
    with pytest.raises(RunFolderError, match=r"files: was .*, now "):
        open_scores(path, "abc", [make_task(tmp_path, test=task.config.dev)])


def test_with_domains_updates_domain(tmp_path: Path) -> None:
    path = tmp_path / END_TASKS_FILE
    scores = two_seeds(tmp_path)
    scores.write(path)
    task = make_task(tmp_path, domain="acl")
    moved = open_scores(path, "abc", [task]).with_domains([task, make_task(tmp_path, name="other", domain="acl")])
    assert list(moved.tasks) == ["toy_text"] and moved.tasks["toy_text"].domain == "acl"
    assert scores.with_seed(task, seed_scores(9, 0.5, 0.5)).tasks["toy_text"].domain == "acl"


def test_open_scores_damaged_file_raises(tmp_path: Path) -> None:
    path = tmp_path / END_TASKS_FILE
    with pytest.raises(RunFolderError, match=r"end_tasks\.json: cannot be read \(No such file"):
        EndTaskScores.read(path)
    two_seeds(tmp_path).write(path)
    path.write_text(path.read_text().replace("0.75", "0.95"))
    with pytest.raises(RunFolderError, match="was altered: its sha256 differs; expected scores of end tasks"):
        EndTaskScores.read(path)
    write_json_with_checksum(path, {**two_seeds(tmp_path).model_dump(mode="json"), "format_version": 1})
    with pytest.raises(RunFolderError, match=r"found format_version .*, expected scores of end tasks, 2"):
        EndTaskScores.read(path)
