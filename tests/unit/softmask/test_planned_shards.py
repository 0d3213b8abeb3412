"""Planned loads and steps of ranks, against masks on shards of as many elements, run or laid out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from das_ds.distributed.state import Shard
from das_ds.functional.directions import Rank, build_projector
from das_ds.functional.projectors import Projector
from das_ds.models.architectures.registry import spec_for
from das_ds.models.find_readers import find_readers
from das_ds.models.language_model import LanguageModel
from das_ds.models.lora import Lora
from das_ds.models.size import MatrixSize, Sharding
from das_ds.preflight.memory import count_parameters
from das_ds.softmask.direction_memory import DirectionForm
from das_ds.softmask.direction_step import directions_step_use
from das_ds.softmask.input_layout import count_stepped
from das_ds.softmask.layer_inputs import LayerInputs
from das_ds.softmask.planned_shards import plan_loads
from helpers.configs import make_config
from helpers.direction_masks import (
    MATRICES,
    SHAPES,
    SIZES,
    cut_values,
    lay_out,
    layouts_of,
    masks_of,
    model_size,
    random_values,
    run_together,
)
from helpers.tiny_models import tiny_model
from helpers.zero_layout import owned

SIZE = model_size(
    MatrixSize(list(SHAPES).index(m.parameter), m.start, m.num_outputs, m.width, m.input, m.transposed)
    for m in MATRICES
)


def sharding(stage: int, num_ranks: int) -> Sharding:
    return Sharding(stage, num_ranks, weight_bytes=4, gradient_bytes=4, num_moments=2)


def shards_of_ranks(stage: int, num_ranks: int) -> list[list[Shard]]:
    return [lay_out(owned(SIZES, stage, rank, num_ranks)) for rank in range(num_ranks)]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7, 24, 97])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_loads_are_those_of_layouts(stage: int, num_ranks: int) -> None:
    shards = shards_of_ranks(stage, num_ranks)
    loads = plan_loads(SIZE, sharding(stage, num_ranks))
    assert len(loads) == num_ranks
    for rank, (load, layout) in enumerate(zip(loads, layouts_of(shards), strict=True)):
        assert load.stepped == count_stepped(MATRICES, shards[rank])
        assert load.fragments == sum(sum(cut.send_sizes) for cut in layout.rounds)
        assert load.completed == sum(sum(cut.receive_sizes) for cut in layout.rounds)


@pytest.mark.parametrize("rank", ["full", 2])
@pytest.mark.parametrize("num_ranks", [1, 2, 7, 24])
@pytest.mark.parametrize("stage", [1, 3])
def test_step_use_is_that_of_a_run(stage: int, num_ranks: int, rank: Rank) -> None:
    """Operations of all ranks, and what each of them is seen to send."""
    shards = shards_of_ranks(stage, num_ranks)
    projectors: dict[str, Projector] = {
        matrix.input: build_projector(torch.diag(torch.arange(1.0, matrix.width + 1)), 1.0, rank) for matrix in MATRICES
    }
    masks = masks_of(shards, projectors)
    gradients = cut_values(shards, random_values(1))
    with FlopCounterMode(display=False) as counter:
        volumes = run_together([m.steps(g, torch._foreach_copy_) for m, g in zip(masks, gradients, strict=True)])
    planned = directions_step_use(SIZE, sharding(stage, num_ranks), DirectionForm(rank, "gradient", decays=False))
    assert planned.flops == counter.get_total_flops()
    sent = [sum(int(v[own].sum() - v[own, own]) for v in volumes) for own in range(num_ranks)]
    assert [load.sent for load in plan_loads(SIZE, sharding(stage, num_ranks))] == sent
    assert [collective.num_bytes for collective in planned.collectives] == ([4 * max(sent)] if any(sent) else [])


def test_loads_without_zero_are_everything() -> None:
    (load,) = plan_loads(SIZE, sharding(0, 8))
    assert sum(load.stepped.values()) == sum(matrix.numel for matrix in MATRICES)
    assert load.sent == load.fragments == 0


@pytest.mark.parametrize("model_type", ["roberta", "llama", "mixtral", "gpt2", "qwen3_moe", "deberta-v2"])
def test_planned_matrices_are_those_of_the_network(model_type: str, tmp_path: Path) -> None:
    """Experts, grouped queries and matrices that are stored transposed; and rows of tokens that domains add."""
    config = make_config(tmp_path, "method=directions", f"model.config={json.dumps({'model_type': model_type})}")
    with torch.device("meta"):
        shapes = tiny_model(model_type)
    model = tiny_model(model_type)
    num_tokens = model.get_input_embeddings().weight.shape[0]
    size = count_parameters(config, shapes, spec_for(model_type), num_tokens)
    parameters = dict(model.named_parameters())
    assert size.parameters == tuple((p.numel(), p.dim() > 1) for p in parameters.values())
    network = LanguageModel(model, spec_for(model_type)).eval()
    traced = LayerInputs.trace(
        find_readers(model, parameters), lambda batch: network(batch.corrupted_ids, batch.predicted, batch.targets)
    )
    numbers = {name: number for number, name in enumerate(parameters)}
    assert size.matrices == tuple(
        MatrixSize(numbers[m.parameter], m.start, m.num_outputs, m.width, m.input, m.transposed)
        for m in traced.matrices
    )
    with torch.device("meta"):
        shapes = tiny_model(model_type)
    grown = count_parameters(config, shapes, spec_for(model_type), num_tokens + 5)
    assert sum(numel for numel, _ in grown.parameters) == grown.trained > size.trained


def test_planned_matrices_of_adapters_are_those_of_peft(tmp_path: Path) -> None:
    config = make_config(tmp_path, "method=directions", "model.config={model_type: llama}", "model.lora={rank: 2}")
    with torch.device("meta"):
        shapes = tiny_model("llama")
    size = count_parameters(config, shapes, spec_for("llama"), 0)
    model = tiny_model("llama")
    assert config.model.lora is not None
    lora = Lora.plan(model, spec_for("llama").layout(model), config.model.lora)
    lora.attach(model, seed=0)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert size.parameters == tuple((p.numel(), True) for p in trained.values())
    network = LanguageModel(model, spec_for("llama")).eval()
    traced = LayerInputs.trace(
        find_readers(model, trained, lora),
        lambda batch: network(batch.corrupted_ids, batch.predicted, batch.targets),
    )
    numbers = {name: number for number, name in enumerate(trained)}
    found = [(m.parameter, m.num_outputs, m.width) for m in size.matrices]
    assert found == [(numbers[m.parameter], m.num_outputs, m.width) for m in traced.matrices]
    # The same matrices share an input.
    planned = [m.input for m in size.matrices]
    actual = [m.input for m in traced.matrices]
    assert [planned.index(name) for name in planned] == [actual.index(name) for name in actual]
