"""Runs whose second domain adds tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

from das_ds.reporting.results import Results
from helpers.runs import small_run

TOKENS = ["treebanks", "baseline", "weeks"]
EMBEDDING = "roberta.embeddings.word_embeddings.weight"
BIAS = "lm_head.bias"


def run_with_tokens(folder: Path, name: str, stage: int, **changes: Any) -> dict[str, Any]:
    """A run whose second domain adds tokens; unclipped, as sums over parameters of other sizes round differently."""
    values = small_run(
        folder,
        output_dir=folder / name,
        data={"add_tokens": {"papers": TOKENS}},
        deepspeed={"zero_optimization": {"stage": stage}},
        **changes,
    )
    values["train"] = {**values["train"], "micro_batch_size": 2, "max_grad_norm": 0.0}
    return values


def without_tokens(values: dict[str, Any]) -> dict[str, Any]:
    """Its section `data` but for the tokens."""
    return {key: value for key, value in values["data"].items() if key != "add_tokens"}


def grown_and_in_two_runs(folder: Path, stage: int, precision: str) -> list[dict[str, Any]]:
    """A run of both domains, a run of the first, and a run of the second that starts from its export."""
    both = run_with_tokens(folder, "both", stage, method={"name": "ncl"}, train={"precision": precision})
    food, papers = both["domains"]
    model = folder / "first" / "domains" / "00_food" / "model"
    first = {**both, "output_dir": folder / "first", "domains": [food], "data": without_tokens(both)}
    second = {**both, "output_dir": folder / "second", "domains": [papers], "model": {"name_or_path": str(model)}}
    return [both, first, {**second, "data": {**both["data"], "tokenizer": str(model)}}]


def check_as_if_added_between_two_runs(folder: Path, complete: Results, alone: Results) -> None:
    """Weights, tokenizers and losses of a run in one piece against those of two runs."""
    for mine, theirs, num_tokens in (
        ("both/domains/00_food", "first/domains/00_food", 300),
        ("both/domains/01_papers", "second/domains/00_papers", 303),
    ):
        weights, expected = (load_file(folder / path / "model" / "model.safetensors") for path in (mine, theirs))
        assert len(weights[EMBEDDING]) == len(weights[BIAS]) == num_tokens
        for key in expected:
            torch.testing.assert_close(weights[key], expected[key], rtol=1e-5, atol=1e-6)
        exported = folder / mine / "model"
        loaded, tokenizer = (kind.from_pretrained(exported) for kind in (AutoModelForMaskedLM, AutoTokenizer))
        assert len(tokenizer) == loaded.config.vocab_size == num_tokens
    # Columns: papers before and after it was learned, in its own tokens.
    assert [row[1] for row in complete.loss_matrix[1:]] == pytest.approx(
        [row[0] for row in alone.loss_matrix], rel=1e-4
    )
