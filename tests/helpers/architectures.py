"""Steps of das and importance passes on every architecture, to compare numbers of ranks and ZeRO stages."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import torch

from das_ds.config import RunConfig
from das_ds.data.batches import Batch
from das_ds.distributed.launch import Ranks
from das_ds.functional.units import Importance
from das_ds.methods.importance_file import save_unit_importance
from das_ds.models.registry import adapter_for
from helpers.importance import measured
from helpers.tiny_models import random_importance, tiny_model, without_dropout
from helpers.training import LENGTH, VOCABULARY, build, random_batch, run_config, train

NUM_STEPS, ROWS = 2, 4
# A persistence threshold of 0 makes ZeRO-3 divide and gather even the smallest parameter.
EVERYTHING_SHARDED = {"stage3_param_persistence_threshold": 0}


def causal_batch(num_rows: int, seed: int) -> Batch:
    """Every token but the first of each row is predicted from those before it."""
    ids = torch.randint(5, VOCABULARY, (num_rows, LENGTH), generator=torch.Generator().manual_seed(seed))
    predicted = torch.arange(ids.numel()).view_as(ids)[:, :-1].flatten()
    return Batch(ids, ids, predicted, ids[:, 1:].flatten(), torch.ones(num_rows))


def steps_of(model_type: str) -> list[list[Batch]]:
    """Joined batches of every optimizer step, of the objective that the architecture is pre-trained with."""
    batch = causal_batch if adapter_for(model_type).objective == "clm" else random_batch
    return [[batch(ROWS, step)] for step in range(NUM_STEPS)]


def config_of(
    folder: Path,
    model_type: str,
    world_size: int,
    stage: int,
    *,
    precision: str = "fp32",
    **model: Any,
) -> RunConfig:
    """A run that is protected by random importance, which it writes to the folder; `model` are keys of that section."""
    path = folder / f"{model_type}.safetensors"
    if not path.exists():
        network = tiny_model(model_type)
        save_unit_importance(path, random_importance(network), adapter_for(model_type).layout(network))
    train_changes = {
        "micro_batch_size": ROWS // world_size,
        "global_batch_size": ROWS,
        "steps_per_domain": NUM_STEPS,
        "precision": precision,
        # Key biases have gradients of rounding alone, which a smaller eps would blow up to whole steps.
        "eps": 1e-4,
    }
    return run_config(
        folder,
        model={"config": {"model_type": model_type}, **model},
        train={**run_config(folder).train.model_dump(), **train_changes},
        deepspeed={"zero_optimization": {"stage": stage, **(EVERYTHING_SHARDED if stage == 3 else {})}},
        method={"view_dropout": 0.0, "importance": {"initial": str(path)}},
    )


def run_each(jobs: list[tuple[str, RunConfig]]) -> list[Any]:
    """What each job gives, or the traceback of one that failed; all of one ZeRO stage.

    Args:
        jobs: `train` gives (weights, logged lines), `importance` the importance under the pre-training loss by group.
    """
    results: list[Any] = []
    for kind, config in jobs:
        assert config.model.config is not None
        model_type = config.model.config["model_type"]
        steps, changes = steps_of(model_type), without_dropout(model_type)
        try:
            if kind == "train":
                results.append(train(config, steps, **changes))
            else:
                batches = [batch for step in steps for batch in step]
                results.append(measured(config, "mlm", batches, changes)["magnitude"])
        except Exception:
            results.append(traceback.format_exc())
    return results


def train_head(config: RunConfig) -> Any:
    """(weights, logged lines) of a DeBERTa whose LM head is given the input embeddings."""
    return train(config, steps_of("deberta-v2"), **without_dropout("deberta-v2"), legacy=False)


def gated_experts(config: RunConfig, gates: Importance, ids: torch.Tensor) -> tuple[list[int], torch.Tensor, list[int]]:
    """Hidden states of a gated mixture of experts, and how many weights of its experts lie here before and after."""
    ranks = Ranks()
    run = build(config, ranks, **without_dropout("mixtral"))
    model: Any = run.engine.module
    experts = model.model.get_submodule("model.layers.1.mlp.experts")
    before = [experts.gate_up_proj.numel(), experts.down_proj.numel()]
    with run.gates.active(gates, num_rows=len(ids)), torch.no_grad():
        hidden, _ = model(ids, torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    after = [experts.gate_up_proj.numel(), experts.down_proj.numel()]
    run.engine.close()
    return before, hidden, after
