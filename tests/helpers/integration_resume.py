"""A Trainer with the callback that is stopped and resumed, on real ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from das_ds.distributed.process_group import init_process_group
from das_ds.integrations.huggingface import ProtectionCallback
from helpers.integrations import build_trainer, compare_all, full_weights, rows, sample


def resume_difference(folder: Path, zero: dict[str, Any] | None) -> float:
    """Largest difference between the weights of a resumed and of an uninterrupted training; a collective."""
    ranks = init_process_group()
    general: Any = rows(sample())
    weights = []
    for resumes in (False, True):
        changes = {} if resumes else {"save_strategy": "steps", "save_steps": 2}
        trainer = build_trainer(folder / "run", zero, ranks.info.world_size, **changes)
        trainer.add_callback(ProtectionCallback(trainer, before=general, measure=False))
        trainer.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2") if resumes else None)
        weights.append(full_weights(trainer))
    return max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])


def compare_and_resume(folder: Path, zero: dict[str, Any] | None) -> tuple[dict[str, Any], float]:
    """`compare_all` of the Trainer, and `resume_difference`."""
    torch.set_num_threads(1)
    return compare_all(folder, "huggingface", zero), resume_difference(folder, zero)
