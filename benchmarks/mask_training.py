"""The trainings that `adam_mask.py` compares: torch with full tensors, and the package over ZeRO on real ranks.

A small RoBERTa with random weights and without dropout learns to predict tokens of a fixed stream, with the soft mask
alone (no contrast) or with nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.harness import build_method, build_model, optimizer_step, run_config
from das_ds.config import RunConfig
from das_ds.data.batch import Batch
from das_ds.distributed.process_group import init_process_group
from das_ds.models.architectures.registry import spec_for
from das_ds.softmask.importance_file import load_unit_importance
from helpers.reference import full_masks

MASK_TOKEN = 4
FIRST_WORD = 5


@dataclass(frozen=True)
class Sizes:
    """The task: a network that is large enough for a table and small enough for a minute."""

    hidden_size: int = 128
    num_heads: int = 4
    intermediate_size: int = 512
    num_layers: int = 2
    vocab_size: int = 1000
    batch_size: int = 8
    sequence_length: int = 64


@dataclass(frozen=True)
class Training:
    """One training: how it steps and what its mask acts on (None: no mask)."""

    optimizer: Literal["adamw", "sgd"]
    learning_rate: float
    eps: float
    num_steps: int
    mask: Literal["update", "gradient"] | None = None


def build_config(sizes: Sizes, training: Training, importance: Path, zero_stage: int, world_size: int) -> RunConfig:
    """The training as a run of the package; its optimizer is AdamW whatever `training` says."""
    model = {
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "num_attention_heads": sizes.num_heads,
        "intermediate_size": sizes.intermediate_size,
        "num_hidden_layers": sizes.num_layers,
        "max_position_embeddings": sizes.sequence_length + 2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    train = {
        "steps_per_domain": training.num_steps,
        "global_batch_size": sizes.batch_size,
        "micro_batch_size": sizes.batch_size // world_size,
        "learning_rate": training.learning_rate,
        "eps": training.eps or 1e-8,
        "precision": "fp32",
    }
    method: dict[str, Any] = {"name": "ncl"}
    if training.mask is not None:
        method = {
            "name": "das",
            "softmask": {"apply_to": training.mask},
            "importance": {"init_from": str(importance)},
            "contrastive": {"weight": 0.0},
        }
    return run_config(model, train, method, sequence_length=sizes.sequence_length, zero_stage=zero_stage)


def build_batches(sizes: Sizes, num_steps: int) -> list[Batch]:
    """One batch per step; word frequencies follow Zipf's law and 15 % of the tokens are masked."""
    generator = torch.Generator().manual_seed(1)
    weights = 1 / torch.arange(1, sizes.vocab_size - FIRST_WORD + 1)
    shape = (sizes.batch_size, sizes.sequence_length)
    num_tokens = sizes.batch_size * sizes.sequence_length
    batches: list[Batch] = []
    for _ in range(num_steps):
        flat = FIRST_WORD + torch.multinomial(weights, num_tokens, replacement=True, generator=generator)
        predicted = torch.randperm(num_tokens, generator=generator)[: round(0.15 * num_tokens)]
        corrupted = flat.index_fill(0, predicted, MASK_TOKEN)
        batches.append(
            Batch(
                input_ids=flat.view(shape),
                corrupted_ids=corrupted.view(shape),
                predicted=predicted,
                targets=flat[predicted],
                row_weights=torch.ones(sizes.batch_size),
            )
        )
    return batches


def rank_part(batch: Batch, rank: int, world_size: int) -> Batch:
    """The rows of a joined batch that one rank reads."""
    num_rows, length = batch.input_ids.shape
    rows = slice(rank * num_rows // world_size, (rank + 1) * num_rows // world_size)
    own = (batch.predicted >= rows.start * length) & (batch.predicted < rows.stop * length)
    return Batch(
        batch.input_ids[rows],
        batch.corrupted_ids[rows],
        batch.predicted[own] - rows.start * length,
        batch.targets[own],
        batch.row_weights[rows],
    )


def train_with_torch(sizes: Sizes, training: Training, importance: Path) -> Tensor:
    """Movement of FFN rows (see `ffn_movement`) in one process, with torch's optimizers and full tensors."""
    model = build_model(build_config(sizes, training, importance, zero_stage=0, world_size=1))
    parameters = dict(model.named_parameters())
    scales = full_masks(model, load_unit_importance(importance, spec_for("roberta").layout(model)))
    start = copies(parameters.items())
    if training.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters.values(), lr=training.learning_rate)
    else:
        optimizer = torch.optim.AdamW(parameters.values(), lr=training.learning_rate, eps=training.eps)
    for batch in build_batches(sizes, training.num_steps):
        optimizer.zero_grad()
        logits = model(input_ids=batch.corrupted_ids).logits.flatten(0, 1)[batch.predicted]
        torch.autograd.backward(cross_entropy(logits, batch.targets))
        before = {name: value.detach().clone() for name, value in parameters.items()}
        if training.mask == "gradient":
            for name, value in parameters.items():
                value.grad *= scales[name]
        optimizer.step()
        if training.mask == "update":
            for name, value in parameters.items():
                value.data = before[name] + scales[name] * (value.data - before[name])
    return ffn_movement(start, copies(parameters.items()))


def train_on_ranks(sizes: Sizes, trainings: list[Training], importance: Path, zero_stage: int) -> list[Tensor]:
    """Movement of FFN rows in each training by the package's engine; to be called on every rank of a group."""
    ranks = init_process_group()
    rank = ranks.info.rank
    world_size = ranks.info.world_size
    movements = []
    for training in trainings:
        method = build_method(build_config(sizes, training, importance, zero_stage, world_size), ranks)
        engine = method.run.engine
        assert engine.zero_stage == zero_stage
        start = copies(engine.weights.fp32_weights())
        for batch in build_batches(sizes, training.num_steps):
            # DeepSpeed's mean over ranks undoes the factor.
            token_scale = torch.tensor(world_size / batch.num_predicted)
            for _ in optimizer_step(method, rank_part(batch, rank, world_size), token_scale):
                pass
        movements.append(ffn_movement(start, copies(engine.weights.fp32_weights())))
        engine.close()
    return movements


def copies(weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Name -> copy of each weight in float64, in which differences of weights are exact."""
    return {name: weight.detach().double() for name, weight in weights}


def ffn_movement(start: dict[str, Tensor], end: dict[str, Tensor]) -> Tensor:
    """Euclidean movement of each row of the FFN's weights, intermediate rows and then output rows, (L * (F + H),)."""
    names = [
        name
        for part in ("intermediate.dense.weight", "output.dense.weight")
        for name in start
        if name.endswith(part) and "attention" not in name
    ]
    return torch.cat([(end[name] - start[name]).norm(dim=1) for name in names])
