"""Models built in parts on real ranks, compared with the plain construction of the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from das_ds.config import ModelConfig, TrainConfig
from das_ds.config.deepspeed import EngineConfig, build_engine_config
from das_ds.distributed.process_group import init_process_group
from das_ds.engine.engine import Engine
from das_ds.engine.optimizer import build_optimizer
from das_ds.engine.sharded_init import ExactWeights, ShardedInit, sharded_init
from das_ds.models.language_model import LanguageModel
from das_ds.models.loading import load_model
from helpers.half import allow_fp16_on_cpu
from helpers.training import run_config

ZERO3: dict[str, Any] = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 50}}


def engine_settings(folder: Path, precision: str, world_size: int) -> tuple[TrainConfig, EngineConfig]:
    """Settings of an engine at ZeRO-3."""
    train = {"precision": precision, "micro_batch_size": 1, "global_batch_size": world_size}
    config = run_config(folder, train=train, deepspeed=ZERO3)
    return config.train, build_engine_config(config, world_size)


def weights_of_loaded(folder: Path, model: ModelConfig, seed: int, precisions: tuple[str, ...]) -> list[dict[str, Any]]:
    """Per precision: the fp32 weights of an engine over a model built in parts, the buffers of the model, what it
    computes, and the largest part of the weights that this rank held."""
    return [_loaded(folder, model, seed, precision) for precision in precisions]


def _loaded(folder: Path, config: ModelConfig, seed: int, precision: str) -> dict[str, Any]:
    allow_fp16_on_cpu()
    ranks = init_process_group()
    train, engine_config = engine_settings(folder, precision, ranks.info.world_size)
    construction = sharded_init(engine_config, ranks)
    assert construction is not None
    model, spec = load_model(config, seed=seed, vocab_size=100, construction=construction)
    parameters = dict(model.named_parameters())
    exact = construction.take_exact_weights()
    slices = exact.take(parameters)
    assert slices.keys() == (set() if precision == "fp32" else parameters.keys())
    assert all(parameter.numel() == 0 for parameter in parameters.values())
    held = {name: own.values.numel() for name, own in slices.items()}
    exact = ExactWeights(slices)
    # Matrices alone decay, though every parameter is an empty vector now.
    groups = build_optimizer(parameters, train, on_host=True).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] > 0 for p in group["params"]}
    engine = Engine(LanguageModel(model, spec), parameters, train, engine_config, ranks, exact)
    assert not any(name in exact for name in parameters)
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        hidden, losses = engine.module.eval()(ids, torch.arange(5), ids.flatten()[:5])
    found = {
        "weights": {name: weight.clone() for name, weight in engine.weights.fp32_weights()},
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        "output": (hidden.float(), losses),
        "held": held,
        "decayed": [name for name, parameter in parameters.items() if id(parameter) in decayed],
    }
    engine.close()
    return found


def random_equal_to_plain(cases: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Names of weights and buffers that differ from the plain construction's, over all architectures."""
    ranks = init_process_group()
    different = []
    for model_type, sizes in cases:
        config = AutoConfig.for_model(model_type, **{**sizes, "pad_token_id": 0})
        auto: Any = AutoModelForMaskedLM if model_type in MASKED else AutoModelForCausalLM

        def construct(auto: Any = auto, config: Any = config) -> PreTrainedModel:
            torch.manual_seed(3)
            return auto.from_config(config, dtype=torch.float32)

        plain = construct()
        construction = ShardedInit(engine_settings(Path(), "bf16", ranks.info.world_size)[1], ranks)
        found = construction.from_config(construct)
        slices = construction.take_exact_weights().take(dict(found.named_parameters()))
        assert dict(found.named_parameters()).keys() == slices.keys()
        for name, weight in plain.named_parameters():
            own = slices[name]
            values = weight.detach().flatten()[own.offset : own.offset + own.values.numel()]
            if not torch.equal(values, own.values):
                different.append(f"{model_type} {name}")
        buffers = dict(found.named_buffers())
        different += [f"{model_type} {n}" for n, b in plain.named_buffers() if not torch.equal(b, buffers[n])]
    return different


MASKED = ("roberta", "bert", "xlm-roberta", "distilbert", "electra", "deberta-v2", "modernbert")
