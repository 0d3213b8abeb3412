"""Tables of a comparison, cell by cell, against values computed by hand."""

from __future__ import annotations

import pytest

from das_ds.reporting import comparison_tables as tables
from das_ds.reporting.comparison import Comparison, Group
from das_ds.reporting.score_matrix import RunScores, ScoredTask, ScoreMatrix, TaskForgetting
from das_ds.reporting.tables import Row
from helpers.comparisons import comparison, group, importance_summary, interval_of_two, pooled, run_summary


def bracket(first: float, second: float, sign: str = "") -> str:
    """Mean and interval of two seeds as a table has them."""
    low, high = interval_of_two(first, second)
    return f"{(first + second) / 2:{sign}.4f} [{low:{sign}.4f}, {high:{sign}.4f}]"


def by_label(rows: list[Row]) -> dict[str, list[str]]:
    return {row[0]: list(row[1:]) for row in rows[1:]}


@pytest.fixture
def several() -> Comparison:
    return comparison(
        group("ncl", [(3.0, 0.9), (3.2, 0.7)], train__learning_rate="1e-3"),
        group("ncl slow", [(4.0, 0.5), (4.2, 0.3)], train__learning_rate="3e-4"),
        group("das", [(3.5, 0.6), (3.7, 0.3)], importance=importance_summary(), train__learning_rate="1e-3"),
        pooled("pool", [2.5]),
    )


def test_settings_rows_have_differing_keys(several: Comparison) -> None:
    rows = tables.settings_rows(several)
    assert rows[0] == ["group", "method", "seeds", "train.learning_rate"]
    assert by_label(rows)["ncl slow"] == ["ncl", "0, 1", "3e-4"]
    assert by_label(rows)["pool"] == ["pool", "0", "-"]


def test_summary_rows_have_mean_and_interval(several: Comparison) -> None:
    rows = tables.summary_rows(several)
    assert rows[0][:5] == ["group", "seeds", "loss after learning", "loss after learning (2..T)", "final loss"]
    learned = bracket(3.0, 3.2)
    assert by_label(rows)["ncl"][:5] == ["2", learned, learned, bracket(3.45, 3.55), bracket(0.9, 0.7, "+")]
    assert by_label(rows)["pool"] == ["1", "2.5000", "2.5000", "2.5000", "-", "+0.0000", "-"]


def test_difference_rows_are_relative_to_the_baseline(several: Comparison) -> None:
    found = by_label(tables.difference_rows(several))
    assert list(found) == ["ncl slow", "das", "pool"]
    # Two groups with two pairs each: p of 0.5 for either, times two.
    assert found["das"][:2] == ["2", "+0.5000 [+0.5000, +0.5000], p 1"]
    assert found["das"][4] == bracket(-0.3, -0.4, "+") + ", p 1"
    assert found["pool"] == ["1", "-0.5000", "-0.5000", "-0.9500", "-", "-0.9000", "-"]
    again = tables.difference_rows(several.model_copy(update={"reference": "das"}))
    assert by_label(again)["ncl"][4] == bracket(0.3, 0.4, "+") + ", p 1"
    of_das = by_label(tables.difference_rows(several, family=["das"]))
    assert of_das["das"][4] == bracket(-0.3, -0.4, "+") + ", p 0.5"
    assert "p" not in of_das["ncl slow"][4]


def test_difference_rows_p_values_are_holm_corrected() -> None:
    def six(label: str, forgetting: float) -> Group:
        return group(label, [(3.0, forgetting + 0.01 * seed) for seed in range(6)])

    # All six differences have one sign, p = 2 / 2^6 = 0.03125: alone it is below 0.05, among three it is not.
    alone = tables.difference_rows(comparison(six("ncl", 0.9), six("das", 0.1)))
    assert by_label(alone)["das"][4].endswith(", p 0.031")
    three = tables.difference_rows(comparison(six("ncl", 0.9), six("das", 0.1), six("ewc", 0.2), six("kd", 0.3)))
    assert by_label(three)["das"][4].endswith(", p 0.094")


def test_matched_baseline_rows_worked_example(several: Comparison) -> None:
    found = by_label(tables.matched_baseline_rows(several))
    assert list(found) == ["das"]
    assert found["das"][0] == "2" and found["das"][3:] == ["+0.6000", bracket(-0.1, -0.2, "+") + ", p 0.5", "-25%"]
    fast = comparison(several.group("ncl"), several.group("ncl slow"), group("das fast", [(2.0, 0.8)]))
    assert by_label(tables.matched_baseline_rows(fast))["das fast"] == ["0", "2.0000", "+0.8000", "-", "-", "-"]
    assert len(tables.matched_baseline_rows(comparison(several.group("ncl"), several.group("das")))) == 1


def test_stage_rows_are_sorted_by_stage(several: Comparison) -> None:
    rows = tables.stage_rows(several)
    assert rows[0] == ["stage", "group", "acl", "pubmed", "general"]
    assert ["after acl", "das", "3.6000", "4.5000", "3.1000"] in rows
    assert [row[:2] for row in rows if row[0] == "after pool"] == [["after pool", "pool"]]
    assert [row[1] for row in rows if row[0] == "before training"] == ["ncl", "ncl slow", "das", "pool"]


def test_forgetting_rows_have_each_domain(several: Comparison) -> None:
    rows = tables.forgetting_rows(several)
    assert rows[0] == ["group", "acl"]
    assert by_label(rows)["das"] == [bracket(0.6, 0.3, "+")]
    assert by_label(rows)["pool"] == ["-"]


def test_mask_saturation_and_overlap_rows_worked_example(several: Comparison) -> None:
    head, others = tables.mask_saturation_rows(several)[1:]
    assert head == ["das", "unit", "head", "0.300", "0.700", "2 (0.350)", "acl 20.0%, pubmed 40.0%"]
    assert others == ["das", "unit", "others", "0.250", "0.750", "-", "acl 20.0%, pubmed 40.0%"]
    # Chance: 0.2 * 0.4 / (0.2 + 0.4 - 0.08).
    assert tables.overlap_rows(several)[1] == ["das", "head", "acl, pubmed", "0.500", "0.154", "0.750"]


def test_mask_saturation_rows_two_seeds_are_averaged() -> None:
    runs = [
        run_summary(seed, 3.0, 0.1, importance=importance_summary(0.2 + 0.1 * seed, jaccard=0.3 + 0.2 * seed))
        for seed in (0, 1)
    ]
    both = comparison(group("das", [(3.0, 0.1)]).model_copy(update={"runs": runs}))
    assert tables.mask_saturation_rows(both)[1][3:6] == ["0.300", "0.700", "2 (0.350)"]
    assert tables.overlap_rows(both)[1][3] == "0.400"


def test_cost_rows_worked_example(several: Comparison) -> None:
    found = by_label(tables.cost_rows(several))
    assert found["ncl"] == ["100", "1.00", "30 min 00 s", "4", "2.000", "2.50"]
    silent = several.group("das").runs[0]
    cost = silent.cost.model_copy(update={"tokens_per_s": None, "peak_memory_gib": None})
    das = several.group("das").model_copy(update={"runs": [silent.model_copy(update={"cost": cost})]})
    assert by_label(tables.cost_rows(comparison(several.group("ncl"), das)))["das"][:2] == ["-", "-"]


def make_scores(last: float | None) -> RunScores:
    matrix = ScoreMatrix(
        scores=[[None, 0.3], [0.8, 0.4], [last, 0.7]],
        forgetting=TaskForgetting(
            average=None if last is None else 0.8 - last, per_task={} if last is None else {"acl_arc": 0.8 - last}
        ),
        backward_transfer=None,
        forward_transfer=0.1,
    )
    return RunScores(
        stages=["before training", "after acl", "after pubmed"],
        tasks=[
            ScoredTask(name="acl_arc", domain="acl", row_learned=1, metric="macro_f1", seeds=[0]),
            ScoredTask(name="chemprot", domain="pubmed", row_learned=2, metric="micro_f1", seeds=[0]),
        ],
        matrices=dict.fromkeys(("reported", "accuracy", "macro_f1", "micro_f1"), matrix),
        missing=[],
    )


def test_task_rows_worked_example() -> None:
    runs = [run_summary(seed, 3.0, 0.1) for seed in (0, 1)]
    scored = [run.model_copy(update={"end_tasks": make_scores(0.5 + 0.1 * run.seed)}) for run in runs]
    both = comparison(group("das", [(3.0, 0.1)]).model_copy(update={"runs": scored}), group("ncl", [(3.0, 0.2)]))
    assert tables.task_rows(both)[1:] == [
        [
            "das",
            "acl_arc",
            "acl",
            "macro_f1",
            "-",
            "0.8000 [0.8000, 0.8000]",
            bracket(0.5, 0.6),
            bracket(0.3, 0.2, "+"),
        ],
        [
            "das",
            "chemprot",
            "pubmed",
            "micro_f1",
            "0.3000 [0.3000, 0.3000]",
            *["0.7000 [0.7000, 0.7000]"] * 2,
            "-",
        ],
    ]
    header, das, ncl = tables.summary_rows(both)
    assert header[-3:] == ["end-task score", "end-task forgetting", "end-task forward transfer"]
    assert das[-3:-1] == [bracket(0.6, 0.65), bracket(0.3, 0.2, "+")] and ncl[-3:] == ["-"] * 3
    # A mean over some of the tasks would be another number.
    missing = runs[0].model_copy(update={"end_tasks": make_scores(None)})
    lacking = comparison(group("das", [(3.0, 0.1)]).model_copy(update={"runs": [missing]}))
    assert "end-task score" not in tables.summary_rows(lacking)[0]
    assert tables.task_rows(lacking)[1][6:] == ["-", "-"]
