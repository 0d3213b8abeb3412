"""RegMean over three domains against plain torch in float64, at several stages and numbers of ranks."""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from das_ds.config import RunConfig, parse_method
from das_ds.context import CorpusSample
from das_ds.data.batch import Batch
from das_ds.distributed.process_group import init_process_group
from das_ds.distributed.resumable import ResumableLoop
from das_ds.methods import build_method
from das_ds.models.architectures.registry import spec_for
from das_ds.training.model_exports import ModelExports
from das_ds.training.train import train
from helpers.architectures import architecture_config, causal_batch
from helpers.parity import relative_difference
from helpers.resume import BrokenOffError, assert_same_run, break_off_at, resumable_run
from helpers.run_ranks import run_ranks
from helpers.runs import run_all
from helpers.tiny_models import tiny_model, without_dropout
from helpers.training import build, no_text_domain, random_batch, rank_part

pytestmark = pytest.mark.multirank

NUM_DOMAINS = 3
OFF_DIAGONAL = 0.8
Weights = dict[str, Tensor]


def text(model_type: str) -> list[Batch]:
    """Batches of each domain, and of general text at the end."""
    batch = causal_batch if spec_for(model_type).objective == "clm" else random_batch
    return [batch(4, 70 + number) for number in range(NUM_DOMAINS + 1)]


def learned(weight: Tensor, number: int) -> Tensor:
    """In place of training: the weight after a domain, of the size of changes that matter."""
    generator = torch.Generator().manual_seed(1000 + number)
    return weight + 0.1 * torch.randn(weight.shape, generator=generator).to(weight)


def merge_all(configs: list[RunConfig], batches: list[Batch], model: dict[str, Any]) -> list[list[Weights]]:
    """Per config the fp32 weights after each domain, whose inputs are measured on this rank's part of a batch."""
    return [merge(config, batches, model) for config in configs]


def merge(config: RunConfig, batches: list[Batch], model: dict[str, Any]) -> list[Weights]:
    ranks = init_process_group()
    run = build(config, ranks, **model)
    weights = run.engine.weights
    method = build_method(run)
    parts = [rank_part(batch, ranks.info.rank, ranks.info.world_size) for batch in batches]
    loops = [lambda label, part=part, **_: ResumableLoop([part]) for part in parts]
    found = []
    for index in range(NUM_DOMAINS):
        general = CorpusSample("inputs of general", loops[-1], None)
        domain = replace(no_text_domain(config.output_dir), index=index, sample_batches=loops[index], general=general)
        method.before_domain(domain)
        for number, name in enumerate(run.engine.parameters):
            weights.map_weights([name], lambda weight, n=number, i=index: learned(weight, 100 * i + n))
        method.after_domain(domain)
        found.append({name: weight.detach().clone() for name, weight in weights.fp32_weights()})
    run.engine.close()
    return found


@cache
def expected(model_type: str, general: bool) -> list[Weights]:
    """The formula in float64, on the inputs that hooks of plain torch give."""
    batches = text(model_type)
    model: Any = nn.Module.to(copy.deepcopy(tiny_model(model_type, **without_dropout(model_type))), torch.float64)
    model.train(False)
    parameters = dict(model.named_parameters())
    total = second_moments(model, batches[-1]) if general else {}
    num_terms = int(general)
    result = []
    for index in range(NUM_DOMAINS):
        before = {name: value.detach().clone() for name, value in parameters.items()}
        for number, value in enumerate(parameters.values()):
            value.data = learned(value.data, 100 * index + number)
        latest = second_moments(model, batches[index])
        for name, value in parameters.items():
            if num_terms and name in latest:
                # As (o, d); Conv1D stores (d, o).
                flip = is_transposed(model, name)
                old, new = (weight.T if flip else weight for weight in (before[name], value.data))
                merged = (old @ total[name] + new @ latest[name]) @ torch.linalg.inv(total[name] + latest[name])
                value.data.copy_(merged.T if flip else merged)
            elif num_terms:
                value.data.copy_((num_terms * before[name] + value.data) / (num_terms + 1))
        total = {name: total.get(name, 0.0) + moment for name, moment in latest.items()}
        num_terms += 1
        result.append({name: value.detach().clone() for name, value in parameters.items()})
    return result


def is_transposed(model: Any, parameter: str) -> bool:
    return isinstance(model.get_submodule(parameter.rpartition(".")[0]), Conv1D)


def second_moments(model: Any, batch: Batch) -> Weights:
    """Weight -> sum of x x^T over what its layer reads, with a mean diagonal of 1 and smaller entries off it."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    total: Weights = {}

    def hear(module: nn.Module, inputs: tuple[Tensor]) -> None:
        x = inputs[0].detach().flatten(0, -2)
        name = names[module.weight]  # type: ignore[index]
        total[name] = total.get(name, 0.0) + sum(torch.outer(row, row) for row in x)

    handles = [m.register_forward_pre_hook(hear) for m in model.modules() if isinstance(m, nn.Linear | Conv1D)]
    hidden = model.base_model(input_ids=batch.corrupted_ids).last_hidden_state
    model.lm_head(hidden.flatten(0, 1)[batch.predicted])
    for handle in handles:
        handle.remove()
    factors = {n: torch.full((n, n), OFF_DIAGONAL).fill_diagonal_(1.0).double() for n in map(len, total.values())}
    return {name: moment / moment.diagonal().mean() * factors[len(moment)] for name, moment in total.items()}


@pytest.mark.parametrize(("stage", "world_size"), [(0, 1), (3, 1), (0, 2), (2, 2), (3, 2)])
@pytest.mark.parametrize("model_type", ["roberta", "gpt2"])
def test_regmean_three_domains_equal_plain_torch(model_type: str, stage: int, world_size: int, tmp_path: Path) -> None:
    """An encoder and a decoder with tied LM heads; the decoder stores its matrices transposed."""
    config = architecture_config(tmp_path, model_type, world_size, stage)
    methods = [
        {"name": "regmean", "off_diagonal": OFF_DIAGONAL, "num_samples": 4, "general": general}
        for general in (False, None)
    ]
    configs = [config.model_copy(update={"method": parse_method(method)}) for method in methods]
    by_rank = run_ranks(merge_all, world_size, configs, text(model_type), without_dropout(model_type))
    for number, general in enumerate((False, True)):
        for mine, theirs in zip(by_rank[0][number], expected(model_type, general), strict=True):
            # Sums of squares in float32, divided by matrices whose condition is a few hundred.
            assert relative_difference(mine, theirs) <= 5e-5
        for other in by_rank[1:]:
            assert all(
                value.equal(again[name])
                for found, again in zip(by_rank[0][number], other[number], strict=True)
                for name, value in found.items()
            )


@pytest.mark.parametrize("model_type", ["roberta", "gpt2"])
def test_regmean_is_neither_the_last_model_nor_the_mean(model_type: str) -> None:
    """The comparison above could not hold by chance."""
    weights = expected(model_type, False)
    base = {name: value.double() for name, value in tiny_model(model_type).named_parameters()}
    first = {name: learned(value, number).detach() for number, (name, value) in enumerate(base.items())}
    assert relative_difference(weights[0], first) == 0.0
    second = {name: learned(value, 100 + number) for number, (name, value) in enumerate(first.items())}
    mean = {name: (first[name] + second[name]) / 2 for name in first}
    for other in (second, mean):
        assert relative_difference(weights[1], other) > 1e-2


def kill_after_merge(values: dict[str, Any]) -> bool:
    """One start that dies when the merged model of a domain is to be exported; whether it came there."""
    reached: list[bool] = []

    def die(*_: Any) -> None:
        reached.append(True)
        raise BrokenOffError

    with patch.object(ModelExports, "export", die), suppress(BrokenOffError):
        train(RunConfig(**values), init_process_group())
    return bool(reached)


def test_regmean_killed_while_measuring_and_after_merge_resumes_bitwise(tmp_path: Path) -> None:
    """In the second domain, which is the first that is merged: it is measured to its end, and merged again."""
    method = {"name": "regmean", "num_samples": 24}
    runs = [resumable_run(tmp_path, name, stage=3, method=method, asynchronous=False) for name in ("whole", "killed")]
    run_ranks(run_all, 2, runs[:1])
    steps = runs[1]["train"]["steps_per_domain"]
    # Where the phase begins, and then within the pass over the sample.
    for _ in range(2):
        assert all(run_ranks(break_off_at, 2, runs[1], ("after", 1, steps)))
    assert all(run_ranks(kill_after_merge, 2, runs[1]))
    run_ranks(run_all, 2, runs[1:])
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
