"""A run over all domains at once: resumed bit for bit, equal on other ranks and stages, one complete model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForMaskedLM, AutoTokenizer

from das_ds.reporting.results import Results
from helpers.resume import assert_same_run, run_in_pieces
from helpers.run_ranks import run_ranks
from helpers.runs import exported_weights, metrics_lines, run_all, small_run

pytestmark = pytest.mark.multirank

TOKEN = "treebanks"


def test_a_pool_continues_and_is_the_same_on_other_ranks(tmp_path: Path) -> None:
    base = small_run(tmp_path, method={"name": "pool"}, data={"add_tokens": {"papers": [TOKEN]}})
    train = {"log_interval": 1, "lr_scheduler": "infinite", "warmup_ratio": 0.25, "decay_ratio": 0.25}

    def values(name: str, stage: int, micro_batch_size: int) -> dict[str, Any]:
        return {
            **base,
            "output_dir": tmp_path / name,
            "train": {**base["train"], **train, "micro_batch_size": micro_batch_size},
            "deepspeed": {"zero_optimization": {"stage": stage}},
            "checkpoint": {"interval": 2},
        }

    run_ranks(run_all, 2, [values("complete", 2, 2)])
    _, breaks = run_ranks(run_in_pieces, 2, values("parts", 2, 2), 6)[0]
    assert sum(phase == "train" and step > 0 for phase, _, step in breaks) > 1
    assert_same_run(tmp_path / "parts", tmp_path / "complete")
    run_ranks(run_all, 1, [values("alone", 3, 8)])
    lines = metrics_lines(tmp_path / "complete")
    expected = metrics_lines(tmp_path / "alone")
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], rel=1e-4)
    _check_budget_and_schedule(lines)
    complete, alone = (Results.read(tmp_path / name / "results.json") for name in ("complete", "alone"))
    for row, other in zip(complete.loss_matrix, alone.loss_matrix, strict=True):
        assert row == pytest.approx(other, rel=1e-4)
    assert complete.learned == [["food", "papers"]] and complete.forgetting.average is None
    _check_model(tmp_path / "complete")


def _check_budget_and_schedule(lines: list[dict[str, Any]]) -> None:
    """Twelve steps, those of two domains, under one schedule: up over three, down over three."""
    assert [line["domain_step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["tokens_seen"] == 12 * 8 * 16
    factors = [0, 1 / 3, 2 / 3, *[1] * 7, 1 - (1 / 3) ** 0.5, 1 - (2 / 3) ** 0.5]
    assert [line["lr"] for line in lines] == pytest.approx([1e-3 * factor for factor in factors])


def _check_model(root: Path) -> None:
    assert [path.name for path in (root / "domains").iterdir()] == ["00_pool"]
    folder = root / "domains" / "00_pool" / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForMaskedLM.from_pretrained(folder)
    # It has the tokens of the last domain, which no other has.
    assert TOKEN in tokenizer.get_vocab() and model.config.vocab_size == len(tokenizer)
    embedding = exported_weights(root, "00_pool")["roberta.embeddings.word_embeddings.weight"]
    assert not embedding[-1].allclose(embedding[:-1].mean(dim=0), atol=1e-6)
    card = (folder / "README.md").read_text()
    assert "Domains all at once: food, papers; 12 steps of 8 sequences of 16 tokens each." in card
