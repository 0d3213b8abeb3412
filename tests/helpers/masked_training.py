"""Training under masks of directions with given projectors: by the engine on real ranks, and in float64."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from das_ds.config import RunConfig
from das_ds.data.batch import Batch
from das_ds.distributed.process_group import init_process_group
from das_ds.functional.projectors import DenseProjector, Projector
from das_ds.methods import build_method
from das_ds.softmask.apply import clear_masks, mask_directions
from das_ds.softmask.input_layout import count_stepped
from das_ds.softmask.masked_matrix import MaskedMatrix
from das_ds.tracking.tracker import Tracker
from das_ds.training.domain_trainer import DomainProgress, DomainTrainer
from helpers.direction_masks import TailProjector, dense
from helpers.parity import EPS
from helpers.reference import adamw_step, step_losses, unit_ones
from helpers.tiny_models import NO_DROPOUT, tiny_model
from helpers.training import LENGTH, build, random_batch, rank_part, run_config

NUM_STEPS = 4
ROWS = 6
ACCUMULATION = 2
WEIGHT_DECAY = 0.5
MAX_NORM = 0.5
Form = Literal["gradient", "update"]
TRANSPOSED = "roberta.embeddings.position_embeddings.weight"
"""Masked as if it were stored transposed, (d, o)."""
NUM_ROWS_MASKED = 93
"""Of the 100 rows of embeddings."""


def masked_matrices() -> list[MaskedMatrix]:
    """Weights of linear layers, embeddings but their last rows, and one transposed matrix of a tiny model."""
    matrices = []
    model = tiny_model(**NO_DROPOUT)
    for name, weight in model.named_parameters():
        is_linear = weight.dim() == 2 and "embeddings" not in name
        if is_linear:
            layer, _, last = name.removesuffix(".weight").rpartition(".")
            shared = layer if last in ("query", "key", "value") else f"{layer}.{last}"
            matrices.append(MaskedMatrix(name, name, 0, *weight.shape, shared))
        elif name.endswith("word_embeddings.weight"):
            matrices.append(MaskedMatrix(name, name, 0, NUM_ROWS_MASKED, weight.shape[1], "head"))
        elif name == TRANSPOSED:
            matrices.append(MaskedMatrix(name, name, 0, weight.shape[1], weight.shape[0], "positions", transposed=True))
    assert len(matrices) == 15
    return matrices


def random_projectors(matrices: list[MaskedMatrix]) -> dict[str, Projector]:
    """Every second one dense; all with eigenvalues between 0 and 1."""
    generator = torch.Generator().manual_seed(11)
    projectors: dict[str, Projector] = {}
    for number, (name, width) in enumerate({matrix.input: matrix.width for matrix in matrices}.items()):
        basis = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
        values = torch.rand(width, generator=generator)
        if number % 2:
            projectors[name] = TailProjector(basis[:, :6].contiguous(), values[:6] - 0.8, 0.8)
        else:
            projectors[name] = DenseProjector((basis * values) @ basis.T)
    return projectors


def masked_config(folder: Path, world_size: int, zero: dict[str, Any], precision: str = "fp32") -> RunConfig:
    """A run without a method of its own."""
    train = {
        **run_config(folder).train.model_dump(),
        "micro_batch_size": ROWS // world_size,
        "global_batch_size": ROWS * ACCUMULATION,
        "steps_per_domain": NUM_STEPS,
        "precision": precision,
        "eps": EPS,
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": MAX_NORM,
    }
    return run_config(folder, train=train, deepspeed={"zero_optimization": zero}, method={"name": "ncl"})


def steps() -> list[list[Batch]]:
    """Joined micro-batches of every optimizer step."""
    return [
        [random_batch(ROWS, 300 + ACCUMULATION * step + m) for m in range(ACCUMULATION)] for step in range(NUM_STEPS)
    ]


def train_masked(runs: list[tuple[RunConfig, Form]]) -> list[tuple[dict[str, torch.Tensor], list[float]]]:
    """Final fp32 weights and norms of gradients of each run, all of one ZeRO stage."""
    return [_train_masked(config, form) for config, form in runs]


def _train_masked(config: RunConfig, form: Form) -> tuple[dict[str, torch.Tensor], list[float]]:
    from helpers.training import Recorder

    ranks = init_process_group()
    run = build(config, ranks, **NO_DROPOUT)
    engine = run.engine
    engine.start_domain(NUM_STEPS)
    matrices = masked_matrices()
    needed = count_stepped(matrices, engine.weights.shards)
    projectors = {name: value for name, value in random_projectors(matrices).items() if name in needed}
    clear_masks(engine)
    mask_directions(engine, matrices, projectors, apply_to=form)
    parts = [[rank_part(batch, ranks.info.rank, ranks.info.world_size) for batch in step] for step in steps()]
    recorder = Recorder()
    progress = DomainProgress("domain", 0, 0, config.train.global_batch_size * LENGTH, NUM_STEPS)
    DomainTrainer(engine, build_method(run), Tracker([recorder]), config.train).run(iter(parts), progress)
    weights = {name: weight.detach().cpu().clone() for name, weight in engine.weights.fp32_weights()}
    engine.close()
    return weights, [line["grad_norm"] for line in recorder.lines]


@cache
def train_plainly(form: Form | None) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The same by autograd and complete products in float64; None: without a mask."""
    model: Any = nn.Module.to(copy.deepcopy(tiny_model(**NO_DROPOUT)), torch.float64).train(False)
    parameters = dict(model.named_parameters())
    moments = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in parameters.items()}
    norms = []
    for number, micro_batches in enumerate(steps()):
        inputs = [vars(batch) for batch in micro_batches]
        loss, _ = step_losses(model, inputs, unit_ones(model), 1.0, contrast=False)
        names = list(parameters)
        gradients = dict(zip(names, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        if form == "gradient":
            gradients = project(gradients)
        norm = torch.stack([gradient.pow(2).sum() for gradient in gradients.values()]).sum().sqrt().item()
        norms.append(norm)
        clip = min(1.0, MAX_NORM / (norm + 1e-6))
        rate = 1e-2 * (NUM_STEPS - number) / NUM_STEPS
        moved = {
            name: adamw_step(
                value.detach(), gradients[name] * clip, *moments[name], number + 1, rate, (0.9, 0.999), EPS, 0.0
            )
            for name, value in parameters.items()
        }
        decayed = {
            name: -rate * (WEIGHT_DECAY if value.ndim > 1 else 0.0) * value.detach()
            for name, value in parameters.items()
        }
        if form == "update":
            moved = project(moved)
        if form is not None:
            decayed = project(decayed)
        for name, value in parameters.items():
            value.data += moved[name] + decayed[name]
    return {name: value.detach().clone() for name, value in parameters.items()}, norms


def project(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Masked matrices times P."""
    matrices = masked_matrices()
    projectors = random_projectors(matrices)
    products = dict(values)
    for matrix in matrices:
        product = dense(projectors[matrix.input])
        value = values[matrix.parameter]
        if matrix.transposed:
            products[matrix.parameter] = product @ value
        else:
            masked = value[: matrix.num_outputs] @ product
            products[matrix.parameter] = torch.cat((masked, value[matrix.num_outputs :]))
    return products
