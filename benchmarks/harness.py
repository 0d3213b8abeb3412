"""Benchmark harness: builds a method over a DeepSpeed engine from a run config, as das_ds does, without text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from das_ds import methods
from das_ds.config import RunConfig
from das_ds.config.deepspeed import build_engine_config
from das_ds.context import DomainContext, build_context
from das_ds.data.batch import Batch
from das_ds.distributed.process_group import ProcessGroup
from das_ds.distributed.resumable import ResumableLoop
from das_ds.methods.base import Method
from das_ds.models.architectures.registry import spec_for
from das_ds.models.loading import load_model
from das_ds.softmask.importance_file import save_unit_importance


def run_config(
    model: dict[str, Any], train: dict[str, Any], method: dict[str, Any], *, sequence_length: int, zero_stage: int
) -> RunConfig:
    """Config of a run with random weights that reads no text and writes nothing.

    Args:
        model: Hugging Face config values including `vocab_size`; a RoBERTa unless they name a `model_type`.
        train, method: values of these sections; by default gradients are not clipped and the learning rate is constant.
    """
    values: dict[str, Any] = {
        "output_dir": "unused",
        "model": {"config": {"model_type": "roberta", **model}},
        "domains": [{"name": "random", "train": ["unused.txt"]}],
        "data": {"sequence_length": sequence_length},
        "train": {"lr_scheduler": "constant_with_warmup", "warmup_ratio": 0.0, "max_grad_norm": 0.0, **train},
        "method": method,
        "deepspeed": {"zero_optimization": {"stage": zero_stage}},
    }
    return RunConfig(**values)


def build_model(config: RunConfig) -> Any:
    """The run's model, built as das_ds does."""
    assert config.model.config is not None, "benchmarks use random weights"
    model, _ = load_model(config.model, seed=config.seed, vocab_size=config.model.config["vocab_size"])
    return model


def build_method(config: RunConfig, ranks: ProcessGroup, domain: DomainContext | None = None) -> Method:
    """The run's method with its engine, ready for the first step of a domain.

    Args:
        config: of the run.
        ranks: the process group.
        domain: with a sample to measure general knowledge on; None: importance is read from a file instead.
    """
    model = build_model(config)
    spec = spec_for(model.config.model_type)
    engine_config = build_engine_config(config, ranks.info.world_size)
    method = methods.build_method(build_context(config, model, spec, engine_config, ranks))
    with TemporaryDirectory() as folder:
        if domain is None:
            no_batches: ResumableLoop[Any] = ResumableLoop([])
            domain = DomainContext(0, "random", lambda _: no_batches, lambda _: no_batches, Path(folder), Path(folder))
        method.before_domain(domain)
    method.run.engine.start_domain(config.train.steps_per_domain)
    method.on_train_start(domain)
    method.run.engine.module.train()
    return method


def optimizer_step(method: Method, batch: Batch, token_scale: torch.Tensor) -> Iterator[None]:
    """One step without accumulation, like `training.domain_trainer`; yields after forward, backward and update."""
    with method.losses(batch, token_scale) as losses:
        yield
        method.run.engine.backward(torch.stack(list(losses.values())).sum())
        yield
    method.run.engine.step()
    yield


def write_importance(path: Path, model: Any, importance: dict[str, torch.Tensor]) -> None:
    """Writes group -> (L, U) where `method.importance.init_from` can read it."""
    save_unit_importance(path, importance, spec_for(model.config.model_type).layout(model))
