"""Training steps and importance measurement of every architecture, compared across ranks and ZeRO stages."""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from das_ds.config import RunConfig
from das_ds.data.batch import Batch
from das_ds.distributed.process_group import init_process_group
from das_ds.functional.units import UnitValues
from das_ds.models.architectures.registry import spec_for
from das_ds.softmask.importance_file import save_unit_importance
from helpers.importance import measured
from helpers.parity import relative_difference
from helpers.run_ranks import run_ranks
from helpers.tiny_models import random_importance, tiny_model, without_dropout
from helpers.training import LENGTH, VOCABULARY, build, random_batch, run_config, train

NUM_STEPS = 2
ROWS = 4
# A persistence threshold of 0 makes ZeRO-3 divide and gather even the smallest parameter.
EVERYTHING_SHARDED = {"stage3_param_persistence_threshold": 0}
PLAIN: tuple[str, dict[str, Any]] = ("train", {})
IMPORTANCE: tuple[str, dict[str, Any]] = ("importance", {})

Results = dict[tuple[str, str], Any]
"""(architecture, name of the run) -> what the run gave, or the traceback of one that failed."""


def causal_batch(num_rows: int, seed: int) -> Batch:
    """Every token but the first of each row is predicted from those before it."""
    ids = torch.randint(5, VOCABULARY, (num_rows, LENGTH), generator=torch.Generator().manual_seed(seed))
    predicted = torch.arange(ids.numel()).view_as(ids)[:, :-1].flatten()
    return Batch(ids, ids, predicted, ids[:, 1:].flatten(), torch.ones(num_rows))


def make_steps(model_type: str) -> list[list[Batch]]:
    """Joined batches of every optimizer step, of the objective that the architecture is pre-trained with."""
    batch = causal_batch if spec_for(model_type).objective == "clm" else random_batch
    return [[batch(ROWS, step)] for step in range(NUM_STEPS)]


def architecture_config(
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
        save_unit_importance(path, random_importance(network), spec_for(model_type).layout(network))
    train_changes = {
        "micro_batch_size": ROWS // world_size,
        "global_batch_size": ROWS,
        "steps_per_domain": NUM_STEPS,
        "precision": precision,
        # Key biases have gradients of rounding alone, which a smaller eps would blow up to full steps.
        "eps": 1e-4,
    }
    return run_config(
        folder,
        model={"config": {"model_type": model_type}, **model},
        train={**run_config(folder).train.model_dump(), **train_changes},
        deepspeed={"zero_optimization": {"stage": stage, **(EVERYTHING_SHARDED if stage == 3 else {})}},
        method={"view_dropout": 0.0, "importance": {"init_from": str(path)}},
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
        steps = make_steps(model_type)
        changes = without_dropout(model_type)
        try:
            if kind == "train":
                results.append(train(config, steps, **changes))
            else:
                batches = [batch for step in steps for batch in step]
                results.append(measured(config, "mlm", batches, changes)["abs_grad"])
        except Exception:
            results.append(traceback.format_exc())
    return results


def run_architectures(
    folder: Path, world_size: int, stage: int, model_types: Iterable[str], runs: dict[str, tuple[str, dict[str, Any]]]
) -> Results:
    """All in one process group of its own, as ZeRO-3 changes torch for the entire process.

    Args:
        folder: for importance files.
        world_size: number of ranks.
        stage: of ZeRO.
        model_types: architectures.
        runs: name -> kind of job and changes of the config's model section and precision.
    """
    keys = [(model_type, name) for model_type in model_types for name in runs]
    jobs = [(runs[name][0], architecture_config(folder, t, world_size, stage, **runs[name][1])) for t, name in keys]
    return dict(zip(keys, run_ranks(run_each, world_size, jobs, timeout=540.0)[0], strict=True))


def get_result(results: Results, model_type: str, name: str = "plain") -> Any:
    """What a run gave: (weights, logged lines) of one that trains, importance by group of one that measures."""
    found = results[model_type, name]
    assert not isinstance(found, str), found
    return found


def check_same_training(found: Results, expected: Results, model_type: str) -> None:
    """Weights and losses agree, and what is of full importance has not moved."""
    (weights, lines), (true_weights, true_lines) = (get_result(results, model_type) for results in (found, expected))
    for trained in (weights, true_weights):
        check_that_full_units_rest(model_type, trained)
    assert relative_difference(weights, true_weights) <= 1e-4
    for name in (f"loss/{spec_for(model_type).objective}", "loss/contrast", "grad_norm"):
        assert [line[name] for line in lines] == pytest.approx([line[name] for line in true_lines], rel=1e-4)


def check_same_importance(found: Results, expected: Results, model_type: str) -> None:
    """Importance by group agrees, and no layer has none."""
    importance, true_importance = (get_result(results, model_type, "importance") for results in (found, expected))
    for group, values in true_importance.items():
        assert (values.amax(dim=1) > 0).all()
        torch.testing.assert_close(importance[group], values, rtol=1e-3, atol=1e-5 * values.max().item())


def check_that_full_units_rest(model_type: str, weights: dict[str, torch.Tensor]) -> None:
    """The last unit of each group has importance 1 in the last layer: nothing it owns, alone or not, may move."""
    start = tiny_model(model_type, **without_dropout(model_type))
    layout = spec_for(model_type).layout(start)
    parameters = dict(start.named_parameters())
    for item in layout.ownerships:
        if item.consumer or item.layer < layout.num_layers - 1:
            continue
        mine = (item.units == layout.num_units[item.group] - 1).any(dim=1)
        assert mine.any()
        before, after = (
            tensor.detach().reshape(layout.shapes[item.parameter]).movedim(1 + item.axis, 1).flatten(0, 1).flatten(1)
            for tensor in (parameters[item.parameter], weights[item.parameter])
        )
        assert torch.equal(before[mine], after[mine]), item.parameter
        assert not torch.equal(before, after), item.parameter


def train_head(config: RunConfig) -> Any:
    """(weights, logged lines) of a DeBERTa whose LM head is given the input embeddings."""
    return train(config, make_steps("deberta-v2"), **without_dropout("deberta-v2"), legacy=False)


def gated_experts(config: RunConfig, gates: UnitValues, ids: torch.Tensor) -> tuple[list[int], torch.Tensor, list[int]]:
    """Hidden states of a gated mixture of experts, and how many weights of its experts lie here before and after."""
    ranks = init_process_group()
    run = build(config, ranks, **without_dropout("mixtral"))
    model: Any = run.engine.module
    experts = model.model.get_submodule("model.layers.1.mlp.experts")
    before = [experts.gate_up_proj.numel(), experts.down_proj.numel()]
    with run.gates.active(gates, num_rows=len(ids)), torch.no_grad():
        hidden, _ = model(ids, torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    after = [experts.gate_up_proj.numel(), experts.down_proj.numel()]
    run.engine.close()
    return before, hidden, after
