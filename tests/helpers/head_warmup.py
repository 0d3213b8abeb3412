"""Runs over an encoder without its LM head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForMaskedLM

from das_ds.config import RunConfig
from das_ds.distributed.process_group import init_process_group
from das_ds.training.train import train
from das_ds.training.trainer import ContinualTrainer
from helpers.configs import changed
from helpers.half import allow_fp16_on_cpu
from helpers.runs import small_run
from helpers.tiny_tokenizer import tiny_tokenizer

SEED = 3
STEPS = 5
RATE = 2e-3


class WarmedUpError(Exception):
    """The head is trained; nothing else is wanted."""


def headless_run(folder: Path, *, stage: int, steps: int = STEPS, **changes: Any) -> dict[str, Any]:
    """A run from a model whose file has no LM head."""
    values = small_run(folder, seed=SEED)
    source = folder / "headless"
    if not source.exists():
        settings = {**values["model"]["config"], "vocab_size": len(tiny_tokenizer()), "initializer_range": 0.2}
        model_type = settings.pop("model_type")
        torch.manual_seed(0)
        AutoModelForMaskedLM.from_config(AutoConfig.for_model(model_type, **settings)).save_pretrained(source)
        stored = load_file(source / "model.safetensors")
        body = {name: value for name, value in stored.items() if not name.startswith("lm_head.")}
        save_file(body, source / "model.safetensors", metadata={"format": "pt"})
    values["model"] = {
        "name_or_path": str(source),
        "allow_missing": ["lm_head"],
        "head_warmup_steps": steps,
        "head_warmup_learning_rate": RATE,
    }
    values["deepspeed"] = {"zero_optimization": {"stage": stage}}
    return changed(values, changes)


def weights_after_warmup(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The fp32 weights when the base model is about to be evaluated."""
    allow_fp16_on_cpu()
    ranks = init_process_group()
    evaluate = ContinualTrainer._evaluate
    found = dict[str, torch.Tensor]()

    def leave(self: ContinualTrainer) -> None:
        found.update({name: weight.clone() for name, weight in self.engine.weights.fp32_weights()})
        raise WarmedUpError

    ContinualTrainer._evaluate = leave  # type: ignore[method-assign]
    try:
        train(RunConfig(**values), ranks)
    except WarmedUpError:
        pass
    finally:
        ContinualTrainer._evaluate = evaluate  # type: ignore[method-assign]
    return found
