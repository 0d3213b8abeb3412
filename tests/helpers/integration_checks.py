"""Other trainers with das_ds's masks against das_ds's own trainer, on real ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.integration_resume import compare_and_resume
from helpers.integrations import compare_all
from helpers.run_ranks import run_ranks

MEASURED = {"directions": 1e-5, "unit": 1e-5, "parameter": 1.01 / 255}
"""Of the largest value; single weights are stored in 255ths, and rounding may choose the next."""
TOLERANCE = 5e-5
"""Of the largest change of a weight: float32 sums in another order, and torch's AdamW in place of the fused kernel."""


def check_equal(differences: dict[str, tuple[float, float, float]]) -> None:
    """Measurements and weights after training are those of das_ds's own trainer."""
    assert differences.keys() == MEASURED.keys()
    for kind, (measured, weights, moved) in differences.items():
        assert measured <= MEASURED[kind], kind
        assert weights <= TOLERANCE
        assert moved > 1e-2


def check_torch(folder: Path, world_size: int) -> None:
    """A loop in plain torch, under DDP with several ranks."""
    check_equal(run_ranks(compare_all, world_size, folder, "ddp" if world_size > 1 else "torch", None)[0])


def check_trainer(folder: Path, world_size: int, zero: dict[str, Any] | None) -> None:
    """Hugging Face's Trainer, which also resumes to the bit."""
    differences, resumed = run_ranks(compare_and_resume, world_size, folder, zero)[0]
    check_equal(differences)
    assert resumed == 0.0
