"""Whole runs in which the second domain adds tokens, at ZeRO 2 and 3 on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

from helpers.run_ranks import run_ranks
from helpers.runs import evaluate_export, exported_weights, run_all, run_stopped_and_continued, small_run

pytestmark = pytest.mark.multirank

TOKENS = ["treebanks", "baseline", "weeks"]
EMBEDDING, BIAS = "roberta.embeddings.word_embeddings.weight", "lm_head.bias"


def run(folder: Path, name: str, stage: int, **changes: Any) -> dict[str, Any]:
    """A run whose second domain adds tokens; unclipped, as sums over parameters of other sizes round differently."""
    values = small_run(
        folder,
        output_dir=folder / name,
        data={"add_tokens": {"papers": TOKENS}},
        deepspeed={"zero_optimization": {"stage": stage}},
        **changes,
    )
    values["train"] = {**values["train"], "micro_batch_size": 2, "grad_clip": 0.0}
    return values


@pytest.mark.parametrize(("stage", "precision"), [(2, "fp32"), (3, "fp32"), (3, "bf16")])
def test_reserved_tokens_are_as_if_added_between_two_runs(stage: int, precision: str, tmp_path: Path) -> None:
    method, train = {"name": "ncl"}, {"precision": precision}
    both = run(tmp_path, "both", stage, method=method, train=train)
    food, papers = both["domains"]
    plain = {key: value for key, value in both["data"].items() if key != "add_tokens"}
    first = {**both, "output_dir": tmp_path / "first", "domains": [food], "data": plain}
    model = tmp_path / "first" / "domains" / "00_food" / "model"
    second = {
        **both,
        "output_dir": tmp_path / "second",
        "domains": [papers],
        "model": {"name_or_path": str(model)},
        "data": {**both["data"], "tokenizer": str(model)},
    }
    whole, _, alone = run_ranks(run_all, 2, [both, first, second])[0]
    folder = tmp_path / "both" / "domains"
    for mine, theirs, num_tokens in (
        (folder / "00_food", model.parent, 300),
        (folder / "01_papers", tmp_path / "second" / "domains" / "00_papers", 303),
    ):
        weights, expected = (load_file(path / "model" / "model.safetensors") for path in (mine, theirs))
        assert len(weights[EMBEDDING]) == len(weights[BIAS]) == num_tokens
        for key in expected:
            torch.testing.assert_close(weights[key], expected[key], rtol=1e-5, atol=1e-6)
        loaded, tokenizer = (kind.from_pretrained(mine / "model") for kind in (AutoModelForMaskedLM, AutoTokenizer))
        assert len(tokenizer) == loaded.config.vocab_size == num_tokens
    # Columns: papers before and after it was learned, in its own tokens.
    assert [row[1] for row in whole.loss_matrix[1:]] == pytest.approx([row[0] for row in alone.loss_matrix], rel=1e-4)


def test_earlier_domains_keep_their_text_and_its_loss_is_that_of_a_run_without_tokens(tmp_path: Path) -> None:
    grown = run(tmp_path, "grown", 2, method={"name": "ncl"})
    plain = {**grown, "output_dir": tmp_path / "plain"}
    plain["data"] = {key: value for key, value in grown["data"].items() if key != "add_tokens"}
    found, expected = run_ranks(run_all, 2, [grown, plain])[0]
    for stage in (0, 1):
        row, same = found.loss_matrix[stage], expected.loss_matrix[stage]
        assert [row[0], row[2]] == pytest.approx([same[0], same[2]], rel=1e-6) and row[1] != same[1]
    model = tmp_path / "grown" / "domains"
    for stage, domain in ((1, "00_food"), (2, "01_papers")):
        losses = run_ranks(evaluate_export, 1, grown, model / domain / "model")[0]
        assert list(losses.values()) == pytest.approx(found.loss_matrix[stage], rel=1e-5)


@pytest.mark.parametrize("granularity", ["unit", "parameter"])
def test_das_grows_and_continues_bitwise(granularity: str, tmp_path: Path) -> None:
    method = {"name": "das", "importance": {"samples": 10, "granularity": granularity}}
    whole, parts = (run(tmp_path, name, 3, method=method) for name in ("whole", "parts"))
    expected = run_ranks(run_all, 2, [whole])[0][0]
    found = run_ranks(run_stopped_and_continued, 2, parts, "das")[0]
    assert found.loss_matrix == expected.loss_matrix
    mine, theirs = (exported_weights(tmp_path / name, "01_papers") for name in ("whole", "parts"))
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    if granularity == "parameter":
        for place, num_tokens in (
            ("importance_general", 300),
            ("domains/00_food/importance", 300),
            ("importance", 303),
        ):
            importance = load_file(tmp_path / "whole" / f"{place}.safetensors")
            assert len(importance[EMBEDDING]) == 24 * num_tokens and len(importance[BIAS]) == num_tokens


def test_each_domain_from_the_base_begins_with_its_own_tokens(tmp_path: Path) -> None:
    both = run(tmp_path, "both", 2, method={"name": "one"})
    alone = run(tmp_path, "alone", 2, method={"name": "ncl"}, domains=both["domains"][1:])
    run_ranks(run_all, 2, [both, alone])
    mine, theirs = exported_weights(tmp_path / "both", "01_papers"), exported_weights(tmp_path / "alone", "00_papers")
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
