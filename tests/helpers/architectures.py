"""Two das steps of every architecture on real ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from das_ds.config import RunConfig
from das_ds.data.batches import Batch
from das_ds.data.causal import NextTokens
from das_ds.methods.importance_file import save_unit_importance
from das_ds.models.registry import adapter_for
from helpers.tiny_models import tiny_model, without_dropout
from helpers.training import LENGTH, VOCABULARY, random_batch, run_config, train

ROWS, NUM_STEPS = 4, 2


def architecture_config(
    folder: Path, model_type: str, *, world_size: int, zero: dict[str, Any], precision: str = "fp32", **model: Any
) -> RunConfig:
    """A run over the tiny network of that type, protected by the random importance in its file."""
    train_section = {
        "global_batch_size": ROWS,
        "micro_batch_size": ROWS // world_size,
        "precision": precision,
        "steps_per_domain": NUM_STEPS,
        # Gradients that are rounding alone (key biases) must not become whole steps.
        "eps": 1e-4,
    }
    return run_config(
        folder,
        model={"config": {"model_type": model_type}, **model},
        train=train_section,
        deepspeed={"zero_optimization": zero},
        method={"importance": {"initial": str(folder / f"{model_type}.safetensors")}},
    )


def save_random_importance_of(folder: Path, model_type: str) -> None:
    """The file that `architecture_config` names."""
    layout = adapter_for(model_type).layout(tiny_model(model_type))
    generator = torch.Generator().manual_seed(0)
    importance = {
        group: torch.rand(layout.num_layers, units, generator=generator) for group, units in layout.num_units.items()
    }
    save_unit_importance(folder / f"{model_type}.safetensors", importance, layout)


def steps_of(model_type: str) -> list[list[Batch]]:
    """Joined batches of the architecture's objective."""
    if adapter_for(model_type).objective == "mlm":
        return [[random_batch(ROWS, seed)] for seed in range(NUM_STEPS)]
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(5, VOCABULARY, (NUM_STEPS, ROWS, LENGTH), generator=generator)
    return [[NextTokens().batch(text, range(ROWS), seed=0, stream="test")] for text in texts]


def train_architectures(configs: list[RunConfig]) -> dict[str, Any]:
    """Model type -> final weights and losses, one after the other on these ranks, which have to be of one stage."""
    found: dict[str, Any] = {}
    for config in configs:
        assert config.model.config is not None, "a tiny network has a config"
        model_type = config.model.config["model_type"]
        weights, lines = train(config, steps_of(model_type), **without_dropout(model_type))
        found[model_type] = weights, [line["loss"] for line in lines]
    return found
