"""Complete runs: any number of ranks, resuming after a stop, and both with importance of parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

from helpers.run_ranks import run_ranks
from helpers.runs import (
    exported_weights,
    metrics_lines,
    run_all,
    run_stopped_and_continued,
    save_random_importance,
    small_run,
)

pytestmark = pytest.mark.multirank

ZERO3 = {"zero_optimization": {"stage": 3}}


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_and_accumulation_do_not_change_the_result(stage: int, tmp_path: Path) -> None:
    def values(name: str, micro_batch_size: int) -> dict[str, Any]:
        run = small_run(tmp_path, output_dir=tmp_path / name, deepspeed={"zero_optimization": {"stage": stage}})
        return {**run, "train": {**run["train"], "micro_batch_size": micro_batch_size}}

    one = run_ranks(run_all, 1, [values("one", 4)])[0][0]
    two = run_ranks(run_all, 2, [values("two", 2)])
    assert two[0][0].loss_matrix == two[1][0].loss_matrix
    for mine, theirs in zip(one.loss_matrix, two[0][0].loss_matrix, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("apply_to", ["update", "gradient"])
def test_parameter_level_runs_on_any_number_of_ranks(apply_to: str, tmp_path: Path) -> None:
    # General knowledge is not measured: without dropout its two views are equal and its gradient is rounding alone.
    initial = str(save_random_importance(small_run(tmp_path), tmp_path / "initial.safetensors"))
    importance = {"num_samples": 10, "granularity": "parameter", "normalization": "tanh_positive", "init_from": initial}
    method = {"name": "das", "importance": importance, "softmask": {"apply_to": apply_to}}

    def values(name: str, micro_batch_size: int) -> dict[str, Any]:
        run = small_run(tmp_path, output_dir=tmp_path / name, method=method, deepspeed=ZERO3)
        return {**run, "train": {**run["train"], "micro_batch_size": micro_batch_size}}

    one = run_ranks(run_all, 1, [values("one", 4)])[0][0]
    two = run_ranks(run_all, 2, [values("two", 2)])[0][0]
    for mine, theirs in zip(one.loss_matrix, two.loss_matrix, strict=True):
        # A weight whose importance lies on the edge between two 255ths may be rounded to either.
        assert mine == pytest.approx(theirs, rel=1e-4)
    files = [load_file(tmp_path / name / "importance.safetensors") for name in ("one", "two")]
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "two" / "domains" / "01_papers" / "model")
    assert files[0].keys() == files[1].keys() == dict(model.named_parameters()).keys()
    for name, mine in files[0].items():
        # The gradient of key biases is rounding alone.
        if "key.bias" not in name:
            assert (mine.int() - files[1][name].int()).abs().max() <= 1, name
    assert any(mine.any() for mine in files[0].values())
    assert (tmp_path / "two" / "report" / "importance.png").exists()


@pytest.mark.parametrize(("precision", "zero"), [("fp32", 2), ("bf16", 2), ("fp16", 3)])
def test_a_run_stopped_between_domains_continues_bitwise(precision: str, zero: int, tmp_path: Path) -> None:
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    base = small_run(tmp_path, method={"name": "ncl"}, train={"precision": precision, "micro_batch_size": 2})
    model = {"config": {**base["model"]["config"], **dropout}}
    # fp16 overflows at first in each domain, at a scale that may not depend on the domain before.
    deepspeed = {"zero_optimization": {"stage": zero}, "fp16": {"initial_scale_power": 22}}
    complete = {**base, "model": model, "deepspeed": deepspeed, "output_dir": tmp_path / "complete"}
    parts = {**complete, "output_dir": tmp_path / "parts"}
    expected = run_ranks(run_all, 2, [complete])[0][0]
    found = run_ranks(run_stopped_and_continued, 2, parts)[0]
    assert found.loss_matrix == expected.loss_matrix and found.tokens_seen == expected.tokens_seen
    weights = exported_weights(tmp_path / "complete", "01_papers")
    continued = exported_weights(tmp_path / "parts", "01_papers")
    assert all(torch.equal(weights[name], continued[name]) for name in weights)
    mine = metrics_lines(tmp_path / "complete")
    theirs = metrics_lines(tmp_path / "parts")
    for name in ("loss", "skipped_steps"):
        assert [line[name] for line in mine] == [line[name] for line in theirs]
    assert all((line["skipped_steps"] > 0) == (precision == "fp16") for line in mine)
