"""Soft masks of directions over two domains against plain torch in float64, at every stage, in 16 bits, offloaded."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from das_ds.config import RunConfig, parse_method
from das_ds.data.batch import Batch
from das_ds.distributed.collectives import rank
from das_ds.distributed.process_group import init_process_group
from das_ds.distributed.resumable import ResumableLoop
from das_ds.distributed.state import Shard
from das_ds.functional.directions import Rank, build_projector
from das_ds.functional.projectors import DenseProjector, Projector
from das_ds.methods import build_method, directions
from das_ds.softmask import direction_moments
from das_ds.softmask.direction import DirectionImportance
from das_ds.softmask.direction_mask import build_direction_mask
from das_ds.softmask.direction_update_mask import build_update_masks
from das_ds.softmask.input_layout import build_input_layout
from das_ds.softmask.input_moments import measure_moments
from das_ds.softmask.linear_inputs import find_masked_matrices
from das_ds.softmask.masked_matrix import MaskedMatrix
from helpers.architectures import architecture_config, make_steps
from helpers.parity import OFFLOAD, parity_configs, relative_difference
from helpers.run_ranks import run_ranks
from helpers.tiny_models import without_dropout
from helpers.training import build, no_text_domain, rank_part
from helpers.two_domains import Expected, learn_all, learn_plainly, make_domains

pytestmark = pytest.mark.multirank

SATURATION = 0.5
APPLY_TO = ("gradient", "update", "both")
METHOD: dict[str, Any] = {"name": "directions", "half_saturation": SATURATION}


@cache
def expected(apply_to: str) -> Expected:
    return learn_plainly(make_domains(), saturation=SATURATION, apply_to=apply_to)


def test_direction_mask_changes_second_domain_only() -> None:
    without = learn_plainly(make_domains())
    for apply_to in APPLY_TO:
        assert relative_difference(expected(apply_to).weights[1], without.weights[1]) > 1e-2
        assert relative_difference(expected(apply_to).weights[0], without.weights[0]) == 0.0


def mask_shard(cuts: list[int], before: torch.Tensor, step: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """This rank's shard of one parameter after a masked step."""
    ranks = init_process_group()
    own = slice(cuts[rank()], cuts[rank() + 1])
    flat = torch.nn.Parameter(before.flatten()[own].clone())
    shards = [Shard("w", flat, 0, own.start, flat.numel())] if flat.numel() else []
    masked = [MaskedMatrix("w", "w", 0, *before.shape, "x")]
    projectors = {"x": DenseProjector(matrix)}
    mask = build_update_masks(shards, {"w": flat}, masked, projectors, ranks.info.device)[flat]
    old = flat.data.clone()
    flat.data += step.flatten()[own]
    for chunk in mask.chunks():
        mask.blend_(flat.data[chunk], old[chunk], chunk)
    mask.finish_(flat.data)
    gradients = [step.flatten()[own].clone()] if shards else []
    build_direction_mask(shards, masked, projectors, ranks.info.device).apply_(gradients)
    if gradients:
        torch.testing.assert_close(flat.data, before.flatten()[own] + gradients[0])
    return flat.data


@pytest.mark.parametrize("cuts", [[0, 10, 21, 35], [0, 15, 18, 35], [0, 16, 35, 35]])
def test_blend_rows_shared_by_ranks_are_combined(cuts: list[int]) -> None:
    """Between rows and within them, twice within one, and with a rank that has nothing."""
    generator = torch.Generator().manual_seed(7)
    before, step, mask = (torch.randn(*shape, generator=generator) for shape in ((5, 7), (5, 7), (7, 7)))
    found = torch.cat(run_ranks(mask_shard, 3, cuts, before, step, mask))
    torch.testing.assert_close(found.view(5, 7), before + step @ mask)


@pytest.mark.parametrize(
    ("zero", "world_size", "precision"),
    [
        ({"stage": 0}, 2, "bf16"),
        ({"stage": 1}, 2, "fp16"),
        ({"stage": 2, **OFFLOAD}, 2, None),
        ({"stage": 3}, 4, "bf16"),
        ({"stage": 3, **OFFLOAD}, 2, None),
    ],
)
def test_directions_two_domains_equal_plain_torch(
    zero: dict[str, Any], world_size: int, precision: str | None, tmp_path: Path
) -> None:
    methods = [{**METHOD, "apply_to": apply_to} for apply_to in APPLY_TO]
    runs = parity_configs(tmp_path, world_size, zero, methods)
    if precision is not None:
        runs += parity_configs(tmp_path, world_size, zero, methods, precision)
    found = run_ranks(learn_all, world_size, runs, make_domains())[0]
    for apply_to, exact in zip(APPLY_TO, found[: len(APPLY_TO)], strict=True):
        for mine, theirs in zip(exact.weights, expected(apply_to).weights, strict=True):
            assert relative_difference(mine, theirs) <= 2e-5
    for apply_to, rounded in zip(APPLY_TO, found[len(APPLY_TO) :], strict=False):
        mine, theirs = (
            torch.cat([(second[n] - first[n]).flatten().double() for n in first if "key.bias" not in n])
            for first, second in (rounded.weights, expected(apply_to).weights)
        )
        assert torch.nn.functional.cosine_similarity(mine, theirs, dim=0) > 0.97


def measure_inputs(config: RunConfig, batch: Batch) -> dict[str, torch.Tensor]:
    """The moments that this rank owns, of its rows of one batch of DeBERTa."""
    ranks = init_process_group()
    run = build(config, ranks, **without_dropout("deberta-v2"))
    inputs = build_input_layout(find_masked_matrices(run), run.engine.weights.shards, ranks)
    moments: dict[str, torch.Tensor | None] = {}
    own = rank_part(batch, ranks.info.rank, ranks.info.world_size)
    measure_moments(run, inputs, lambda _: ResumableLoop([own]), "inputs", moments)
    run.engine.close()
    return {name: moment for name, moment in moments.items() if moment is not None}


def test_second_moments_tables_read_by_every_rank_count_once(tmp_path: Path) -> None:
    batch = make_steps("deberta-v2")[0][0]
    alone = run_ranks(measure_inputs, 1, architecture_config(tmp_path, "deberta-v2", 1, 2), batch)[0]
    both = run_ranks(measure_inputs, 2, architecture_config(tmp_path, "deberta-v2", 2, 2), batch)
    assert sorted(name for found in both for name in found) == sorted(alone)
    for found in both:
        for name, moment in found.items():
            torch.testing.assert_close(moment, alone[name], rtol=1e-4, atol=1e-5)


def masks_made(config: RunConfig) -> tuple[list[str], list[str], list[int]]:
    """Inputs whose projector this rank computes, those that it owns, and widths of those that it computes."""
    ranks = init_process_group()
    run = build(config, ranks, **without_dropout("roberta"))
    method = build_method(run)
    assert isinstance(method, directions.Directions)
    made: list[int] = []

    def counted(moment: torch.Tensor, saturation: float, form: Rank, *options: Any) -> Projector:
        made.append(len(moment))
        return build_projector(moment, saturation, form, *options)

    inputs = method._inputs
    own = inputs.owned_by(ranks.info.rank)
    moments = {name: torch.eye(width) if name in own else None for name, width in inputs.widths.items()}
    with patch.object(direction_moments, "build_projector", counted):
        method._importance = DirectionImportance(run, inputs, moments, None)
        method.on_train_start(no_text_domain(config.output_dir))
    run.engine.close()
    return list(inputs.widths), own, made


@pytest.mark.parametrize("stage", [1, 3])
def test_projectors_are_computed_by_owners_only(stage: int, tmp_path: Path) -> None:
    config = architecture_config(tmp_path, "roberta", 2, stage)
    config = config.model_copy(update={"method": parse_method(METHOD)})
    found = run_ranks(masks_made, 2, config)
    # Queries, keys and values share one; four a layer, the LM head's dense layer, and the embeddings.
    assert all(len(names) == 10 for names, *_ in found)
    assert sorted(name for _, own, _ in found for name in own) == sorted(found[0][0])
    for _, own, made in found:
        assert len(made) == len(own) > 0
