"""Runs that continue earlier ones: every method, other ranks, interrupted, new tokens, and text or models gone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from das_ds.reporting.results import Results
from helpers.continued import (
    DECODER,
    METHODS,
    assert_continued,
    beginning,
    complete,
    continuing,
    long_run,
    parsed_start_errors,
    run_parsed,
)
from helpers.resume import DROPOUT, assert_same_run, run_in_pieces
from helpers.run_ranks import run_ranks
from helpers.tokens import TOKENS

pytestmark = pytest.mark.multirank


@pytest.mark.parametrize("method", METHODS)
def test_continued_run_equals_one_run(method: str, tmp_path: Path) -> None:
    whole = long_run(tmp_path, "whole", method=METHODS[method])
    run_ranks(run_parsed, 2, [whole, beginning(whole, "first", 2), continuing(whole, "next", "first", 2, 3)])
    assert_continued(tmp_path / "next", tmp_path / "whole", 2)


def test_lora_run_continues_its_adapters(tmp_path: Path) -> None:
    whole = long_run(tmp_path, "whole", model={"config": DECODER, "lora": {"rank": 4}}, method=METHODS["ewc"])
    run_ranks(run_parsed, 2, [whole, beginning(whole, "first", 2), continuing(whole, "next", "first", 2, 3)])
    assert_continued(tmp_path / "next", tmp_path / "whole", 2)


@pytest.mark.parametrize("method", ["das", "directions", "ewc", "derpp"])
def test_run_continues_on_fewer_ranks(method: str, tmp_path: Path) -> None:
    whole = long_run(tmp_path, "whole", method=METHODS[method], train={"micro_batch_size": 2})
    fewer = {"train": {"micro_batch_size": 4}, "deepspeed": {"zero_optimization": {"stage": 1}}}
    run_ranks(run_parsed, 2, [whole, beginning(whole, "first", 2)])
    run_ranks(run_parsed, 1, [continuing(whole, "next", "first", 2, 3, **fewer)])
    # Sums in another order.
    assert_continued(tmp_path / "next", tmp_path / "whole", 2, rtol=1e-3, atol=1e-4)


def test_continued_run_in_pieces_equals_one_run(tmp_path: Path) -> None:
    model = {"config": {**long_run(tmp_path, "unused")["model"]["config"], **DROPOUT}}
    changes = {"checkpoint": {"interval": 1, "async_save": False}, "evaluation": {"every_steps": 3, "batch_size": 2}}
    whole = long_run(tmp_path, "whole", model=model, method=METHODS["das"], **changes)
    following = continuing(whole, "next", "first", 2, 3)
    run_ranks(run_parsed, 2, [whole, beginning(whole, "first", 2), following])
    assert_continued(tmp_path / "next", tmp_path / "whole", 2)
    pieces = complete({**following, "output_dir": tmp_path / "pieces"})
    _, breaks = run_ranks(run_in_pieces, 2, pieces, 3)[0]
    # Also while the models of the earlier run are evaluated, and while the domain is trained.
    assert any(phase == "evaluate" and number < 2 for phase, number, _ in breaks)
    assert any(phase == "train" for phase, _, _ in breaks)
    assert_same_run(tmp_path / "pieces", tmp_path / "next")


@pytest.mark.parametrize("method", ["ncl", "directions", "das"])
def test_run_continues_with_added_tokens(method: str, tmp_path: Path) -> None:
    """Each domain but the first adds tokens; those of the third are in no checkpoint of the first two.

    Sums over an embedding of another size round differently.
    """
    whole = long_run(tmp_path, "whole", method=METHODS.get(method, {"name": method}), train={"max_grad_norm": 0.0})
    tokens = {"papers": TOKENS[:1], "law": TOKENS[1:]}
    whole["data"] = {**whole["data"], "add_tokens": tokens}
    first = beginning(whole, "first", 2)
    first["data"] = {**first["data"], "add_tokens": {"papers": tokens["papers"]}}
    following = continuing(whole, "next", "first", 2, 3, data={"add_tokens": {"law": tokens["law"]}})
    run_ranks(run_parsed, 2, [whole, first, following])
    assert_continued(tmp_path / "next", tmp_path / "whole", 2, rtol=1e-4, atol=1e-5)


def test_run_continues_without_models_or_text_that_are_gone(tmp_path: Path) -> None:
    whole = long_run(tmp_path, "whole", method=METHODS["ewc"])
    run_ranks(run_parsed, 1, [whole, beginning(whole, "first", 2)])
    # All but the last checkpoint.
    for folder in sorted((tmp_path / "first" / "checkpoints").iterdir())[:-1]:
        shutil.rmtree(folder)
    Path(whole["domains"][0]["train"][0]).unlink()
    refused = continuing(whole, "refused", "first", 2, 3)
    allowed = continuing(whole, "next", "first", 2, 3)
    allowed["continue_from"] = {"run": allowed["continue_from"], "evaluate": False}
    (message,) = run_ranks(parsed_start_errors, 1, [refused])[0]
    assert "food.txt" in message
    assert (
        f"food was learned by {tmp_path / 'first'}: put its text back, or set continue_from.evaluate: false" in message
    )
    run_ranks(run_parsed, 1, [allowed])
    found, expected = (Results.read(tmp_path / run / "results.json") for run in ("next", "whole"))
    matrix = found.loss_matrix
    # Nothing that was measured is lost, and nothing else is made up: columns are food, papers, law, general.
    assert [row[:2] for row in matrix] == [*[row[:2] for row in expected.loss_matrix[:3]], [None, None]]
    assert [row[2:] for row in matrix[2:]] == [row[2:] for row in expected.loss_matrix[2:]]
    assert [row[2] for row in matrix[:2]] == [expected.loss_matrix[0][2], None]
    assert [row[3] for row in matrix] == [row[3] for row in expected.loss_matrix]
    assert found.forgetting.average is None and found.forgetting.per_domain == {}
    assert found.general_drift == expected.general_drift
    report = (tmp_path / "next" / "report" / "report.md").read_text(encoding="utf-8")
    assert "| after law" in report and (tmp_path / "next" / "report" / "index.html").exists()


def test_run_does_not_continue_what_does_not_fit(tmp_path: Path) -> None:
    whole = long_run(tmp_path, "whole", method={"name": "ncl"}, train={"steps_per_domain": 2})
    run_ranks(run_parsed, 1, [beginning(whole, "first", 1)])
    text = tmp_path / "first.txt"
    text.write_text((tmp_path / "food.txt").read_text(encoding="utf-8") * 2, encoding="utf-8")
    other_text: dict[str, Any] = continuing(whole, "other text", "first", 0, 2)
    other_text["domains"] = [{**other_text["domains"][0], "train": [str(text)]}, other_text["domains"][1]]
    damaged = continuing(whole, "damaged", "first", 1, 2)
    (message,) = run_ranks(parsed_start_errors, 1, [other_text])[0]
    assert f"continue_from: found other text or tokens of food than {tmp_path / 'first'} was trained" in message
    (last,) = [path for path in (tmp_path / "first" / "checkpoints").iterdir() if "finished" in path.name]
    with next(last.glob("*.safetensors")).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    (message,) = run_ranks(parsed_start_errors, 1, [damaged])[0]
    assert message.startswith(f"continue_from: {last} is corrupt: ") and "restore an intact copy" in message
    assert last.exists()
