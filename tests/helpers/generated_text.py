"""Runs that replay text which their model writes, and what they wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from das_ds.data.generated import read_generated
from helpers.configs import changed
from helpers.runs import small_run
from helpers.tiny_models import GROUPED

NUM_SEQUENCES = 10
"""Not a multiple of ranks and batches."""
LLAMA = {**GROUPED, "model_type": "llama", "vocab_size": 300}


def generating_run(
    folder: Path, name: str, stage: int, *, causal: bool, replay: dict[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    """A run that may be saved at every boundary, of an encoder or a decoder."""
    section = {
        "fraction": 0.25,
        "source": "generated",
        "generation": {"num_sequences": NUM_SEQUENCES, "batch_size": 2},
        **(replay or {}),
    }
    values = small_run(
        folder,
        output_dir=folder / name,
        train={"steps_per_domain": 2, "micro_batch_size": 2, "log_interval": 1},
        evaluation={"max_sequences": 8},
        method={"name": "replay", "replay": section},
        deepspeed={"zero_optimization": {"stage": stage}},
        checkpoint={"interval": 1, "async_save": False},
    )
    if causal:
        values["model"] = {"config": LLAMA}
    return changed(values, changes)


def generated_tokens(run: Path, domain: str) -> torch.Tensor:
    """What a run wrote before a domain, (N, S)."""
    blocks, _ = read_generated(run / "domains" / domain / "generated", document_mask=False)
    return blocks.index_select(range(len(blocks)))
