"""Complete runs of the product on real ranks, over text and a tokenizer made by the test."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from das_ds.config import RunConfig
from das_ds.context import DomainContext
from das_ds.distributed.process_group import init_process_group
from das_ds.errors import DasError
from das_ds.methods import METHODS
from das_ds.methods.base import Method
from das_ds.models.loading import load_model
from das_ds.reporting.results import Results
from das_ds.softmask.importance_file import save_parameter_importance
from das_ds.training.evaluate import evaluate_model
from das_ds.training.train import train
from helpers.configs import changed
from helpers.half import allow_fp16_on_cpu
from helpers.tiny_models import NO_DROPOUT
from helpers.tiny_tokenizer import TEXT, tiny_tokenizer

WORDS = TEXT.split()


def small_run(folder: Path, **changes: Any) -> dict[str, Any]:
    """Config values of a run over two small domains and general text; `changes` are nested dictionaries of keys."""
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        tiny_tokenizer().save_pretrained(tokenizer)
    corpora = {name: _corpus(folder / f"{name}.txt", shift) for shift, name in enumerate(("food", "papers", "general"))}
    values: dict[str, Any] = {
        "output_dir": folder / "run",
        "model": {
            "config": {
                "model_type": "roberta",
                "hidden_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 3,
                "intermediate_size": 40,
                "max_position_embeddings": 40,
                **NO_DROPOUT,
            }
        },
        "domains": [
            {"name": name, "train": [str(corpora[name])], "valid_fraction": 0.1} for name in ("food", "papers")
        ],
        "general": {"name": "general", "valid": [str(corpora["general"])]},
        "data": {"sequence_length": 16, "tokenizer": str(tokenizer), "cache_dir": str(folder / "cache")},
        "train": {
            "steps_per_domain": 6,
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "learning_rate": 1e-3,
            "precision": "fp32",
            "log_interval": 2,
            "eps": 1e-4,
        },
        # All of what the domains hold out, a part of the general text.
        "evaluation": {"max_sequences": 24},
        "method": {"name": "das", "importance": {"num_samples": 10}, "view_dropout": 0.0},
        "deepspeed": {"zero_optimization": {"stage": 2}},
        "wandb": {"mode": "disabled"},
    }
    return changed(values, changes)


def save_random_importance(values: dict[str, Any], path: Path) -> Path:
    """Random importance of every weight of a run's model, written to `path`."""
    model, spec = load_model(RunConfig(**values).model, seed=0, vocab_size=len(tiny_tokenizer()))
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randint(0, 256, (weight.numel(),), generator=generator, dtype=torch.uint8)
        for name, weight in model.named_parameters()
    }
    save_parameter_importance(path, weights, spec.layout(model))
    return path


def run_all(runs: list[dict[str, Any]]) -> list[Results]:
    """Each config run in turn on these ranks, which have to be of one ZeRO stage."""
    allow_fp16_on_cpu()
    ranks = init_process_group()
    return [train(RunConfig(**values), ranks) for values in runs]


def start_errors(runs: list[dict[str, Any]]) -> list[str]:
    """The message with which each run ends on these ranks."""
    ranks = init_process_group()
    messages = []
    for values in runs:
        with pytest.raises(DasError) as caught:
            train(RunConfig(**values), ranks)
        messages.append(str(caught.value))
    return messages


def run_stopped_and_continued(values: dict[str, Any], method: str = "ncl") -> Results:
    """The first start is interrupted at the second domain, after which the same command continues."""
    allow_fp16_on_cpu()
    ranks = init_process_group()
    config = RunConfig(**values)
    kind = METHODS[method]
    before_domain = kind.before_domain

    def fail_at_second(self: Method, domain: DomainContext) -> None:
        if domain.index == 1:
            raise KeyboardInterrupt
        before_domain(self, domain)

    kind.before_domain = fail_at_second  # type: ignore[method-assign]
    try:
        train(config, ranks)
    except KeyboardInterrupt:
        pass
    finally:
        kind.before_domain = before_domain  # type: ignore[method-assign]
    return train(config, ranks)


def run_whose_source_vanishes(values: dict[str, Any], source: Path, world_size: int) -> Results:
    """The folder that the model was read from is removed as soon as the first domain begins, by the last rank."""
    allow_fp16_on_cpu()
    ranks = init_process_group()
    before_domain = Method.before_domain

    def remove_first(self: Method, domain: DomainContext) -> None:
        ranks.barrier()
        if ranks.info.rank == world_size - 1:
            shutil.rmtree(source, ignore_errors=True)
        ranks.barrier()
        before_domain(self, domain)

    Method.before_domain = remove_first  # type: ignore[method-assign]
    try:
        return train(RunConfig(**values), ranks)
    finally:
        Method.before_domain = before_domain  # type: ignore[method-assign]


def evaluate_export(values: dict[str, Any], folder: Path) -> dict[str, float]:
    """Losses of an exported model on these ranks."""
    return evaluate_model(RunConfig(**values), init_process_group(), folder)


def exported_weights(run_folder: Path, domain: str) -> dict[str, torch.Tensor]:
    """Weights of one exported model."""
    return load_file(run_folder / "domains" / domain / "model" / "model.safetensors")


def metrics_lines(run_folder: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def last_step(run_folder: Path) -> int:
    """Step of the last complete line of metrics.jsonl, which a run may be writing; 0 where there is none."""
    path = run_folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return next((json.loads(line)["global_step"] for line in reversed(lines) if line.endswith("\n")), 0)


def _corpus(path: Path, shift: int) -> Path:
    # Domains are the same words in another order, so that they differ and yet each helps the others.
    lines = [" ".join(WORDS[(shift * 7 + i * (shift + 1) + j) % len(WORDS)] for j in range(12)) for i in range(60)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
