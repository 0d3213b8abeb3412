"""End-task score matrix: values computed by hand, missing scores, and incompatible files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from das_ds.downstream.scores import EndTaskScores, Scores, SeedScores, SeedStatistics, TaskScores
from das_ds.errors import RunFolderError
from das_ds.reporting.results import Results
from das_ds.reporting.score_matrix import RunScores, read_run_scores
from das_ds.run_dir import END_TASKS_FILE, RESULTS_FILE
from helpers.configs import record_continued

ResultsMaker = Callable[..., Results]
FOLDERS = ["base", "domains/00_acl", "domains/01_pubmed", "domains/02_restaurant"]
# acl_arc is forgotten by 0.3, then 0.2 comes back; chemprot, of pubmed, by 0.05; restaurant_asc was helped by 0.2.
BY_HAND = {
    "acl_arc": [0.4, 0.9, 0.6, 0.8],
    "chemprot": [0.3, 0.35, 0.7, 0.65],
    "restaurant_asc": [0.2, 0.3, 0.4, 0.8],
    "general_qa": [0.5, 0.5, 0.5, 0.4],
}
DOMAINS = {"chemprot": "pubmed"}


def entry(test: dict[int, float], *, domain: str | None = None, **changes: Any) -> TaskScores:
    """Scores by seed; micro-F1 is half and accuracy a tenth of macro-F1, which is reported."""
    values: dict[str, Any] = {
        "domain": domain,
        "metric": "macro_f1",
        "labels": ["no", "yes"],
        "settings": {"epochs": 3},
        "seeds": [
            SeedScores(
                seed=seed,
                epochs=3,
                best_epoch=2,
                dev=Scores(accuracy=0.0, macro_f1=0.0, micro_f1=0.0),
                test=Scores(accuracy=score / 10, macro_f1=score, micro_f1=score / 2),
            )
            for seed, score in test.items()
        ],
        "dev": SeedStatistics(mean=0.0, deviation=None),
        "test": SeedStatistics(mean=0.0, deviation=None),
    }
    return TaskScores(**{**values, **changes})


def write_row(root: Path, folder: str, tasks: dict[str, TaskScores]) -> None:
    (root / folder).mkdir(parents=True, exist_ok=True)
    EndTaskScores(model="abc", tasks=tasks).write(root / folder / END_TASKS_FILE)


@pytest.fixture
def make_run(make_results: ResultsMaker, tmp_path: Path) -> Callable[..., Path]:
    """(missing cells, results' options) -> a run folder with the scores by hand, two seeds around each."""

    def make(missing: set[tuple[str, int]] = frozenset(), **options: Any) -> Path:  # type: ignore[assignment]
        make_results(**options).write(tmp_path / RESULTS_FILE)
        for row, folder in enumerate(FOLDERS):
            there = {name: scores[row] for name, scores in BY_HAND.items() if (name, row) not in missing}
            entries = {
                name: entry({0: score - 0.1, 1: score + 0.1}, domain=DOMAINS.get(name)) for name, score in there.items()
            }
            write_row(tmp_path, folder, entries)
        return tmp_path

    return make


def read(root: Path) -> RunScores:
    scores = read_run_scores(root)
    assert scores is not None
    return scores


def test_read_run_scores_worked_example(make_run: Callable[..., Path]) -> None:
    scores = read(make_run())
    assert scores.stages == ["before training", "after acl", "after pubmed", "after restaurant"]
    assert [(task.name, task.domain, task.row_learned, task.metric, task.seeds) for task in scores.tasks] == [
        ("acl_arc", "acl", 1, "macro_f1", [0, 1]),
        ("chemprot", "pubmed", 2, "macro_f1", [0, 1]),
        ("restaurant_asc", "restaurant", 3, "macro_f1", [0, 1]),
        ("general_qa", None, 0, "macro_f1", [0, 1]),
    ]
    reported = scores.matrices["reported"]
    for column, expected in enumerate(BY_HAND.values()):
        assert [row[column] for row in reported.scores] == pytest.approx(expected)
    assert reported.forgetting.per_task == pytest.approx({"acl_arc": 0.1, "chemprot": 0.05})
    assert reported.forgetting.average == pytest.approx((0.1 + 0.05) / 2)
    assert reported.backward_transfer == pytest.approx(-0.075)
    assert reported.forward_transfer == pytest.approx((0.35 - 0.3 + 0.4 - 0.2) / 2)
    assert scores.matrices["macro_f1"] == reported
    assert scores.matrices["micro_f1"].forgetting.average == pytest.approx(0.075 / 2)
    assert scores.matrices["accuracy"].scores[0][0] == pytest.approx(0.04)
    assert scores.missing == ["general_qa belongs to no domain (tasks.N.domain) and counts in no mean"]
    assert RunScores.model_validate_json(json.dumps(scores.model_dump(mode="json"))) == scores


def test_read_run_scores_two_tasks_of_a_domain_count_once(make_run: Callable[..., Path]) -> None:
    root = make_run()
    for folder, score in (("domains/00_acl", 0.9), ("domains/02_restaurant", 0.4)):
        again = {"acl_arc": entry({0: 0.9}), "acl": entry({0: score}), "chemprot": entry({0: 0.5}, domain="pubmed")}
        write_row(root, folder, again)
    forgetting = read(root).matrices["reported"].forgetting
    # chemprot's seed 0 scored 0.6 after pubmed; restaurant_asc was learned last.
    assert forgetting.per_task == pytest.approx({"acl_arc": 0.0, "acl": 0.5, "chemprot": 0.1})
    assert forgetting.average == pytest.approx(((0.0 + 0.5) / 2 + 0.1) / 2)


@pytest.mark.parametrize(
    ("cell", "forgetting_is_known", "forward_is_known"),
    [
        (("acl_arc", 0), True, True),
        (("acl_arc", 1), False, True),
        (("acl_arc", 2), True, True),
        (("acl_arc", 3), False, True),
        (("chemprot", 0), True, False),
        (("chemprot", 1), True, False),
        (("restaurant_asc", 3), True, True),
    ],
)
def test_read_run_scores_missing_score_is_none_and_noted(
    make_run: Callable[..., Path], cell: tuple[str, int], forgetting_is_known: bool, forward_is_known: bool
) -> None:
    scores = read(make_run({cell}))
    name, row = cell
    matrix = scores.matrices["reported"]
    column = [task.name for task in scores.tasks].index(name)
    assert matrix.scores[row][column] is None
    assert (matrix.forgetting.average is not None) == forgetting_is_known == (matrix.backward_transfer is not None)
    assert (matrix.forward_transfer is not None) == forward_is_known
    assert f"{name} was not measured {scores.stages[row]}" in scores.missing
    # Other tasks are unaffected.
    assert matrix.forgetting.per_task.keys() == {"acl_arc", "chemprot"} - ({name} if not forgetting_is_known else set())


def test_read_run_scores_unfinished_run_has_fewer_rows(make_run: Callable[..., Path]) -> None:
    scores = read(make_run(num_rows=3))
    assert scores.stages == ["before training", "after acl", "after pubmed"]
    matrix = scores.matrices["reported"]
    assert len(matrix.scores) == 3
    assert matrix.forgetting.per_task == pytest.approx({"acl_arc": 0.3})
    assert matrix.forward_transfer == pytest.approx((0.35 - 0.3 + 0.4 - 0.2) / 2)


def test_read_run_scores_pool_has_no_forgetting(make_run: Callable[..., Path]) -> None:
    root = make_run(method="pool", num_rows=2, learned=[["acl", "pubmed", "restaurant"]])
    write_row(root, "domains/00_pool", {"acl_arc": entry({0: 0.9}), "restaurant_asc": entry({0: 0.7})})
    scores = read(root)
    assert scores.stages == ["before training", "after pool"]
    matrix = scores.matrices["reported"]
    assert matrix.forgetting.average is matrix.backward_transfer is matrix.forward_transfer is None
    assert matrix.scores[1] == [0.9, None, 0.7, None] and matrix.forgetting.per_task == {}
    assert [task.row_learned for task in scores.tasks] == [1, 1, 1, 0]


def test_read_run_scores_only_common_seeds_count(make_run: Callable[..., Path]) -> None:
    root = make_run()
    write_row(root, "domains/02_restaurant", {"acl_arc": entry({1: 0.5, 7: 0.0})})
    scores = read(root)
    assert scores.tasks[0].seeds == [1]
    assert scores.matrices["reported"].forgetting.per_task["acl_arc"] == pytest.approx(1.0 - 0.5)
    assert "acl_arc has seeds 0, 7 after some stages only; they are omitted" in scores.missing
    write_row(root, "domains/02_restaurant", {"acl_arc": entry({7: 0.0})})
    with pytest.raises(RunFolderError, match=r"no seed of task acl_arc that all of the run's 4 models were fine-tuned"):
        read_run_scores(root)


def test_read_run_scores_newest_domain_of_a_task_counts(make_run: Callable[..., Path]) -> None:
    root = make_run()
    write_row(root, "domains/02_restaurant", {"acl_arc": entry({0: 0.5}, domain="pubmed")})
    assert (read(root).tasks[0].domain, read(root).tasks[0].row_learned) == ("pubmed", 2)
    write_row(root, "domains/02_restaurant", {"acl_arc": entry({0: 0.5}, domain="phone")})
    with pytest.raises(
        RunFolderError,
        match=r"02_restaurant/end_tasks\.json: found domain phone of task acl_arc, expected one of",
    ):
        read_run_scores(root)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"epochs": 4}}, r"02_restaurant/.*found task acl_arc with other settings .*differ in epochs\)"),
        ({"labels": ["yes", "no"]}, r"differ in labels\)"),
    ],
)
def test_read_run_scores_other_settings_are_rejected(
    make_run: Callable[..., Path], changes: dict[str, Any], message: str
) -> None:
    root = make_run()
    write_row(root, "domains/02_restaurant", {"acl_arc": entry({0: 0.5}, **changes)})
    with pytest.raises(RunFolderError, match=message):
        read_run_scores(root)


def test_read_run_scores_of_a_continued_run_has_models_of_the_earlier_one(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    root = make_run()
    expected = read_run_scores(root)
    first, following = record_continued(tmp_path, ("acl", "law"), "acl", ("pubmed", "restaurant"))
    for number, folder in enumerate(FOLDERS):
        place = (first if number < 2 else following) / folder
        place.parent.mkdir(exist_ok=True)
        (root / folder).rename(place)
    write_row(first, "domains/01_law", {"acl_arc": entry({0: 0.1, 1: 0.1})})
    (root / RESULTS_FILE).rename(following / RESULTS_FILE)
    assert read_run_scores(following) == expected


def test_read_run_scores_without_scores_is_none(make_results: ResultsMaker, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"results\.json: cannot be read"):
        read_run_scores(tmp_path)
    make_results().write(tmp_path / RESULTS_FILE)
    assert read_run_scores(tmp_path) is None
