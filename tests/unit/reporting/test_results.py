"""The model of results.json: keys, values, round trip, and rejection of damaged files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from das_ds.errors import RunFolderError, TrainingError
from das_ds.reporting.results import Results, build_results
from das_ds.run_dir import RESULTS_FILE
from das_ds.storage import write_json_with_checksum

ResultsMaker = Callable[..., Results]


def test_results_file_has_expected_keys_and_values(make_results: ResultsMaker, tmp_path: Path) -> None:
    make_results().write(tmp_path / RESULTS_FILE)
    content = json.loads((tmp_path / RESULTS_FILE).read_text())
    assert {key: content[key] for key in ("format_version", "complete", "method")} == {
        "format_version": 3,
        "complete": True,
        "method": "das",
    }
    assert content["eval_domains"] == [*content["domains"], "general"] == ["acl", "pubmed", "restaurant", "general"]
    assert content["loss_matrix"][2] == [4.6, 2.0, 4.3, 3.2]
    assert content["forgetting"]["average"] == pytest.approx(0.45)
    assert content["forgetting"]["per_domain"] == pytest.approx({"acl": 0.7, "pubmed": 0.2})
    assert content["general_drift"] == pytest.approx(0.4)
    assert content["backward_transfer"] == pytest.approx(-0.45)
    assert content["forward_transfer"] == pytest.approx(0.1)
    assert (content["tokens_seen"], content["wall_seconds"]) == (1_234_567, 3725.4)
    assert (content["world_size"], content["zero_stage"]) == (2, 3)
    assert content["versions"]["torch"] == torch.__version__


def test_results_round_trip_over_older_file_is_equal(make_results: ResultsMaker, tmp_path: Path) -> None:
    path = tmp_path / RESULTS_FILE
    make_results(num_rows=1).write(path)
    make_results().write(path)
    assert Results.read(path) == make_results()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("num_rows", [1, 2])
def test_build_results_unfinished_run_has_no_forgetting(make_results: ResultsMaker, num_rows: int) -> None:
    results = make_results(num_rows=num_rows)
    assert not results.complete
    assert results.forgetting.model_dump_json() == '{"average":null,"per_domain":{}}'
    assert results.backward_transfer is None and "backward_transfer" not in results.summary
    assert results.stages == ["before training", "after acl"][:num_rows]
    assert results.losses_learned == {"acl": 4.0} if num_rows == 2 else not results.losses_learned


def test_build_results_pool_has_one_row_and_no_forgetting(make_results: ResultsMaker, tmp_path: Path) -> None:
    results = make_results("pool", num_rows=2, learned=[["acl", "pubmed", "restaurant"]])
    assert results.complete and results.stages == ["before training", "after pool"]
    assert results.rows_learned == {"acl": 1, "pubmed": 1, "restaurant": 1}
    assert results.losses_learned == {"acl": 4.0, "pubmed": 4.5, "restaurant": 4.1}
    assert results.forgetting.average is results.backward_transfer is results.forward_transfer is None
    assert results.summary == pytest.approx({"general_drift": 0.1})
    results.write(tmp_path / RESULTS_FILE)
    assert Results.read(tmp_path / RESULTS_FILE) == results


def test_build_results_without_general_corpus_has_no_drift(make_results: ResultsMaker) -> None:
    results = make_results(general=False)
    assert results.general_drift is None
    assert "general_drift" not in results.summary


def test_build_results_other_corpora_drift_by_themselves(tmp_path: Path) -> None:
    """They are no part of the general drift, with or without a general corpus; other orders of columns are refused."""
    values: dict[str, Any] = {"method": "ncl", "domains": ["acl"], "tokens_seen": 1, "wall_seconds": 1.0}
    matrix = [[5.0, 4.0, 3.0, 2.0], [4.0, 4.5, 2.75, 2.5]]
    both = build_results(
        **values,
        eval_domains=["acl", "general", "law", "code"],
        loss_matrix=matrix,
        world_size=1,
        zero_stage=0,
        others=["law", "code"],
    )
    assert both.general_drift == 0.5 and both.drift == {"law": -0.25, "code": 0.5}
    assert both.summary == {"general_drift": 0.5, "drift/law": -0.25, "drift/code": 0.5}
    both.write(tmp_path / RESULTS_FILE)
    assert Results.read(tmp_path / RESULTS_FILE) == both
    alone = build_results(
        **values,
        eval_domains=["acl", "law"],
        loss_matrix=[row[:2] for row in matrix],
        world_size=1,
        zero_stage=0,
        others=["law"],
    )
    assert alone.general_drift is None and alone.drift == {"law": 0.5}
    with pytest.raises(ValidationError, match="at most one general corpus, and those of drift"):
        Results.model_validate({**both.model_dump(), "eval_domains": ["acl", "law", "general", "code"]})


def test_results_table_and_summary_worked_example(make_results: ResultsMaker) -> None:
    columns, rows = make_results().table
    assert columns == ["stage", "acl", "pubmed", "restaurant", "general"]
    assert rows[1] == ["after acl", 4.0, 4.5, 4.1, 3.1]
    assert make_results().summary == pytest.approx(
        {
            "forgetting/average": 0.45,
            "forgetting/acl": 0.7,
            "forgetting/pubmed": 0.2,
            "backward_transfer": -0.45,
            "forward_transfer": 0.1,
            "general_drift": 0.4,
        }
    )


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_build_results_non_finite_loss_is_named(loss: float) -> None:
    with pytest.raises(
        TrainingError, match=rf"held-out loss of general after 1 domains: found {loss}, expected a finite"
    ):
        build_results(
            method="das",
            domains=["acl"],
            eval_domains=["acl", "general"],
            loss_matrix=[[1.0, 1.0], [1.0, loss]],
            tokens_seen=1,
            wall_seconds=1.0,
            world_size=1,
            zero_stage=0,
        )


def test_results_write_unwritable_folder_is_named(make_results: ResultsMaker, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"missing/results\.json: cannot be written \(No such file.*free space"):
        make_results().write(tmp_path / "missing" / RESULTS_FILE)


def change(content: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**content, **changes}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: change(content, format_version=2), "found format_version 2, expected the results of a run, 3"),
        (lambda content: change(content, method=None), "method: .*; expected the results of a run"),
        (lambda content: {"format_version": 3}, "complete: Field required.*versions: Field required"),
        (lambda content: change(content, extra=1), "extra: Extra inputs"),
        (lambda content: change(content, eval_domains=["acl"] * 4), "must be the domains in order"),
        (lambda content: change(content, learned=[["acl"], ["restaurant"]]), "learned must have every domain in order"),
        (lambda content: change(content, learned=[*content["learned"], []]), "in stages of at least one"),
        (lambda content: change(content, loss_matrix=[[1.0]]), "at most 4 rows of 4 numbers"),
        (lambda content: change(content, loss_matrix=[[1.0] * 4] * 5), "at most 4 rows of 4 numbers"),
    ],
)
def test_results_read_damaged_file_names_the_fault(
    make_results: ResultsMaker, tmp_path: Path, damage: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    path = tmp_path / RESULTS_FILE
    write_json_with_checksum(path, damage(make_results().model_dump()))
    with pytest.raises(RunFolderError, match=message) as caught:
        Results.read(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b'{"format_version": 3}'])
def test_results_read_other_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / RESULTS_FILE
    path.write_bytes(content)
    with pytest.raises(RunFolderError, match=r"is no JSON object with a sha256.*expected the results of a run"):
        Results.read(path)


def test_results_read_altered_value_is_noticed(make_results: ResultsMaker, tmp_path: Path) -> None:
    path = tmp_path / RESULTS_FILE
    make_results().write(path)
    path.write_text(path.read_text().replace("1234567", "1234568"))
    with pytest.raises(RunFolderError, match=r"was altered: its sha256 differs"):
        Results.read(path)


def test_results_read_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"results\.json: cannot be read \(No such file"):
        Results.read(tmp_path / RESULTS_FILE)


def test_results_are_immutable(make_results: ResultsMaker) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        make_results().method = "ncl"


def test_build_results_of_a_continued_run_keeps_what_was_not_measured(tmp_path: Path) -> None:
    """pubmed is new, but for the base model only its last one is there; text of acl is gone since."""
    results = build_results(
        method="das",
        domains=["acl", "pubmed"],
        eval_domains=["acl", "pubmed", "general", "extra"],
        loss_matrix=[[6.0, None, 3.0, None], [4.0, 5.0, 3.1, 2.0], [None, 2.0, 3.4, 2.5]],
        others=["extra"],
        tokens_seen=1,
        wall_seconds=1.0,
        world_size=1,
        zero_stage=0,
        tokens_per_byte={"acl": 0.5, "pubmed": 0.5, "general": 0.5, "extra": 0.5},
    )
    assert results.forgetting.model_dump() == {"average": None, "per_domain": {}}
    assert (results.backward_transfer, results.forward_transfer) == (None, None)
    assert results.general_drift == pytest.approx(0.4) and results.drift == {"extra": None}
    assert results.losses_learned == {"acl": 4.0, "pubmed": 2.0}
    assert results.last_losses == {"pubmed": 2.0, "general": 3.4, "extra": 2.5}
    assert results.bits_per_byte is not None and results.bits_per_byte[2][0] is None
    assert results.summary == {"general_drift": results.general_drift}
    results.write(tmp_path / RESULTS_FILE)
    assert Results.read(tmp_path / RESULTS_FILE) == results
