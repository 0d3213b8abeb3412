"""Runs that replay text which their model writes: the same on any ranks, and after interruptions bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from das_ds.data.generated import read_generated
from helpers.resume import assert_same_run, run_in_pieces
from helpers.run_ranks import run_ranks
from helpers.runs import metrics_lines, run_all, small_run
from helpers.tiny_models import GROUPED

pytestmark = pytest.mark.multirank

NUM_SEQUENCES = 10
"""Not a multiple of ranks and batches."""
LLAMA = {**GROUPED, "model_type": "llama", "vocab_size": 300}


def generating_run(folder: Path, name: str, stage: int, **changes: Any) -> dict[str, Any]:
    replay = {
        "fraction": 0.25,
        "source": "generated",
        "generation": {"num_sequences": NUM_SEQUENCES, "batch_size": 2},
        **changes.pop("replay", {}),
    }
    return small_run(
        folder,
        output_dir=folder / name,
        train={"steps_per_domain": 2, "micro_batch_size": 2, "log_interval": 1},
        evaluation={"max_sequences": 8},
        method={"name": "replay", "replay": replay},
        deepspeed={"zero_optimization": {"stage": stage}},
        checkpoint={"interval": 1, "async_save": False},
        **changes,
    )


def generated_tokens(run: Path, domain: str) -> torch.Tensor:
    blocks, _ = read_generated(run / "domains" / domain / "generated", document_mask=False)
    return blocks.index_select(range(len(blocks)))


def test_generated_text_any_ranks_and_interruptions_give_the_same(tmp_path: Path) -> None:
    kl = {"loss": "kl"}
    by_layer = {"source": "both", "generation": {"num_sequences": NUM_SEQUENCES, "gather_weights": False}}

    def causal(name: str, stage: int, replay: dict[str, Any]) -> dict[str, Any]:
        values = generating_run(tmp_path, name, stage, replay=replay)
        values["model"] = {"config": LLAMA}
        return values

    run_ranks(
        run_all,
        2,
        [causal("complete", 3, kl), generating_run(tmp_path, "masked", 3), causal("by_layer", 3, by_layer)],
    )
    run_ranks(run_all, 1, [causal("alone", 0, kl), generating_run(tmp_path, "masked_alone", 0)])
    _, breaks = run_ranks(run_in_pieces, 2, causal("pieces", 3, kl), 3)[0]
    assert {phase for phase, _, _ in breaks} >= {"before", "train"}
    assert_same_run(tmp_path / "pieces", tmp_path / "complete")
    for domain in ("00_food", "01_papers"):
        assert torch.equal(
            generated_tokens(tmp_path / "pieces", domain), generated_tokens(tmp_path / "complete", domain)
        )
    first = generated_tokens(tmp_path / "alone", "00_food")
    assert first.shape == (NUM_SEQUENCES, 16) and len(first.unique(dim=0)) == NUM_SEQUENCES
    assert torch.equal(first, generated_tokens(tmp_path / "complete", "00_food"))
    assert torch.equal(first, generated_tokens(tmp_path / "by_layer", "00_food"))
    assert not torch.equal(first, generated_tokens(tmp_path / "complete", "01_papers"))
    masked = generated_tokens(tmp_path / "masked", "00_food")
    assert torch.equal(masked, generated_tokens(tmp_path / "masked_alone", "00_food"))
    # The first domain learns from the model before it, too.
    assert all(line["loss/replay_kl"] >= 0.0 for line in metrics_lines(tmp_path / "complete"))
