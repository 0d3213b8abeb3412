"""Runs that replay text which their model writes: the same on any ranks, and after interruptions bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.generated_text import NUM_SEQUENCES, generated_tokens, generating_run
from helpers.resume import assert_same_run, run_in_pieces
from helpers.run_ranks import run_ranks
from helpers.runs import metrics_lines, run_all

pytestmark = pytest.mark.multirank


def test_generated_text_any_ranks_and_interruptions_give_the_same(tmp_path: Path) -> None:
    def causal(name: str, stage: int) -> dict[str, object]:
        return generating_run(tmp_path, name, stage, causal=True, replay={"loss": "kl"})

    run_ranks(run_all, 2, [causal("complete", 3), generating_run(tmp_path, "masked", 3, causal=False)])
    run_ranks(run_all, 1, [causal("alone", 0), generating_run(tmp_path, "masked_alone", 0, causal=False)])
    _, breaks = run_ranks(run_in_pieces, 2, causal("pieces", 3), 3)[0]
    assert {phase for phase, _, _ in breaks} >= {"before", "train"}
    assert_same_run(tmp_path / "pieces", tmp_path / "complete")
    for domain in ("00_food", "01_papers"):
        pieces, complete = (generated_tokens(tmp_path / name, domain) for name in ("pieces", "complete"))
        assert torch.equal(pieces, complete)
    first = generated_tokens(tmp_path / "complete", "00_food")
    assert first.shape == (NUM_SEQUENCES, 16) and len(first.unique(dim=0)) == NUM_SEQUENCES
    # In fp32 no uniform is within rounding of a boundary.
    assert torch.equal(first, generated_tokens(tmp_path / "alone", "00_food"))
    assert not torch.equal(first, generated_tokens(tmp_path / "complete", "01_papers"))
    masked, alone = (generated_tokens(tmp_path / name, "00_food") for name in ("masked", "masked_alone"))
    assert torch.equal(masked, alone)
    # The first domain learns from the model before it, too.
    assert all("loss/replay_kl" in line for line in metrics_lines(tmp_path / "complete"))
