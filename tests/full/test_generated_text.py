"""Generated text in every kind of run that writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.generated_text import generated_tokens, generating_run
from helpers.resume import assert_same_run, break_off_at, run_in_pieces
from helpers.run_ranks import run_ranks
from helpers.runs import run_all
from helpers.tiny_tokenizer import tiny_tokenizer

pytestmark = pytest.mark.multirank

EOS = tiny_tokenizer().eos_token_id
BOS = tiny_tokenizer().bos_token_id


def general_with_text(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    return {**values, "general": {"name": "general", "train": values["general"]["valid"]}}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_generated_text_of_all_stages_is_that_of_one_rank(stage: int, causal: bool, tmp_path: Path) -> None:
    both = {"source": "both"}
    run_ranks(run_all, 1, [generating_run(tmp_path, "alone", 0, causal=causal, replay=both)])
    run_ranks(run_all, 2, [generating_run(tmp_path, "ranks", stage, causal=causal, replay=both)])
    alone, ranks = (generated_tokens(tmp_path / name, "00_food") for name in ("alone", "ranks"))
    assert torch.equal(alone, ranks)


def test_gathered_layer_by_layer_is_gathered_at_once(tmp_path: Path) -> None:
    by_layer = {"num_sequences": 10, "batch_size": 2, "gather_weights": False}
    run_ranks(
        run_all,
        2,
        [
            generating_run(tmp_path, "at_once", 3, causal=True),
            generating_run(tmp_path, "by_layer", 3, causal=True, replay={"generation": by_layer}),
        ],
    )
    for domain in ("00_food", "01_papers"):
        at_once, by_layers = (generated_tokens(tmp_path / name, domain) for name in ("at_once", "by_layer"))
        assert torch.equal(at_once, by_layers)


def test_generation_stopped_on_two_ranks_continues_on_one(tmp_path: Path) -> None:
    complete, broken = (generating_run(tmp_path, name, 2, causal=True) for name in ("complete", "broken"))
    assert all(run_ranks(break_off_at, 2, broken, ("before", 0, 0)))
    run_ranks(run_all, 1, [complete, broken])
    assert torch.equal(*(generated_tokens(tmp_path / name, "00_food") for name in ("complete", "broken")))


def test_directions_protect_generated_text_in_a_run_in_pieces(tmp_path: Path) -> None:
    def values(name: str) -> dict[str, Any]:
        run = generating_run(tmp_path, name, 3, causal=True)
        replay = run["method"]["replay"]
        return {**run, "method": {"name": "directions", "general": "generated", "num_samples": 6, "replay": replay}}

    run_ranks(run_all, 2, [values("complete")])
    _, breaks = run_ranks(run_in_pieces, 2, values("pieces"), 3)[0]
    assert sum(phase == "before" for phase, _, _ in breaks) > 2
    assert_same_run(tmp_path / "pieces", tmp_path / "complete")
    plasticity = json.loads((tmp_path / "complete" / "domains" / "01_papers" / "plasticity.json").read_text())
    assert plasticity["protected"] == ["generated text", "food"]


@pytest.mark.parametrize("stage", [2, 3])
def test_isolated_documents_and_prompts_in_bf16(stage: int, tmp_path: Path) -> None:
    generation = {"num_sequences": 10, "prompt_tokens": 3, "top_p": 0.9}
    values = generating_run(
        tmp_path,
        "run",
        stage,
        causal=True,
        replay={"generation": generation},
        train={"precision": "bf16"},
        data={"document_mask": True},
    )
    run_ranks(run_all, 2, [general_with_text(tmp_path, values)])
    tokens = generated_tokens(tmp_path / "run", "01_papers")
    # A document follows each end; ends in prompts, too.
    ends = (tokens[:, 2:-1] == EOS).nonzero()
    assert all(tokens[row, column + 3] == BOS for row, column in ends.tolist())
    assert not torch.isin(tokens[:, 3:], torch.tensor([1, 3, 4])).any()


@pytest.mark.parametrize("causal", [False, True])
def test_generated_text_has_no_token_that_the_domain_adds(causal: bool, tmp_path: Path) -> None:
    values = generating_run(
        tmp_path, "run", 2, causal=causal, data={"add_tokens": {"food": ["treebanks"], "papers": ["baseline", "weeks"]}}
    )
    run_ranks(run_all, 2, [values])
    assert generated_tokens(tmp_path / "run", "00_food").max() < 300
    assert generated_tokens(tmp_path / "run", "01_papers").max() < 301


def test_generated_text_of_lora(tmp_path: Path) -> None:
    runs = [
        generating_run(tmp_path, f"stage{stage}", stage, causal=True)
        | {"model": {**generating_run(tmp_path, "x", stage, causal=True)["model"], "lora": {"rank": 2}}}
        for stage in (2, 3)
    ]
    for run in runs:
        run_ranks(run_all, 2, [run])
    assert torch.equal(*(generated_tokens(tmp_path / f"stage{stage}", "00_food") for stage in (2, 3)))
