"""Masked matrices and moments of small runs on real ranks, at any ZeRO stage."""

from __future__ import annotations

import traceback

import torch

from das_ds.config import RunConfig
from das_ds.context import RunContext
from das_ds.data.batch import Batch
from das_ds.distributed.collectives import all_reduce_sum
from das_ds.distributed.process_group import init_process_group
from das_ds.softmask.linear_inputs import find_masked_matrices, record_inputs
from das_ds.softmask.masked_matrix import MaskedMatrix
from helpers.architectures import make_steps
from helpers.tiny_models import without_dropout
from helpers.training import build, rank_part

Found = tuple[list[MaskedMatrix], dict[str, torch.Tensor]]
"""Masked matrices, and input -> sum over ranks of w x x^T (d, d) without tables, before and after a step."""


def find_all(configs: list[RunConfig]) -> list[Found | str]:
    """Of each run, or the traceback of one that failed; all of one ZeRO stage."""
    found: list[Found | str] = []
    for config in configs:
        try:
            found.append(find_one(config))
        except Exception:
            found.append(traceback.format_exc())
    return found


def find_one(config: RunConfig) -> Found:
    """Of one run: found, recorded, and trained by one step in between, which has to work as ever."""
    ranks = init_process_group()
    assert config.model.config is not None
    model_type = config.model.config["model_type"]
    run = build(config, ranks, **without_dropout(model_type))
    matrices = find_masked_matrices(run)
    batch = rank_part(make_steps(model_type)[0][0], ranks.info.rank, ranks.info.world_size)
    sums = record(run, batch, matrices)
    run.engine.start_domain(1)
    _, losses = run.engine(batch.corrupted_ids, batch.predicted, batch.targets, batch.position_ids)
    run.engine.backward(losses.sum())
    run.engine.step()
    assert find_masked_matrices(run) == matrices
    after = record(run, batch, matrices)
    assert all(not torch.equal(sums[name], after[name]) for name in sums if ".layers.1." in name and sums[name].any())
    run.engine.close()
    return matrices, sums


def record(run: RunContext, batch: Batch, matrices: list[MaskedMatrix]) -> dict[str, torch.Tensor]:
    """Sums over the ranks."""
    widths = {matrix.input: matrix.width for matrix in matrices}
    sums = {name: torch.zeros(width, width) for name, width in widths.items()}

    def receive(name: str, x: torch.Tensor, weights: torch.Tensor | None, is_table: bool) -> None:
        if not is_table:
            x = x.float()
            sums[name] += x.T @ (x if weights is None else x * weights[:, None])

    run.engine.module.eval()
    with record_inputs(run, widths, receive) as recorder, torch.no_grad():
        recorder.start(batch)
        run.engine.module(batch.corrupted_ids, batch.predicted, batch.targets, batch.position_ids)
    run.engine.module.train()
    return {name: all_reduce_sum(total) for name, total in sums.items()}
