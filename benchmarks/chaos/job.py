"""Job of the chaos test: three domains, das with dropout on two ranks, frequent checkpoints."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml

from helpers.tiny_tokenizer import TEXT, tiny_tokenizer

DOMAINS = ("food", "papers", "pubmed")
EVERY_STEPS = 4
LINES = 120


def job_settings(zero_stage: int, granularity: str) -> dict[str, Any]:
    """The run config without its text and folders."""
    return {
        "model": {
            "config": {
                "model_type": "roberta",
                "hidden_size": 48,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "intermediate_size": 96,
                "max_position_embeddings": 40,
            }
        },
        # Two micro-steps per step. The intervals of logging and saving and the steps of a domain are coprime, so that
        # kills hit half-filled averages of losses.
        "train": {
            "steps_per_domain": 25,
            "global_batch_size": 16,
            "micro_batch_size": 4,
            "learning_rate": 1e-3,
            "precision": "fp32",
            "log_interval": 3,
        },
        "method": {"name": "das", "importance": {"num_samples": 160, "granularity": granularity}},
        "evaluation": {"batch_size": 1, "max_sequences": 24},
        "deepspeed": {"zero_optimization": {"stage": zero_stage}},
        "checkpoint": {"interval": EVERY_STEPS, "keep_last": 3, "async_save": True},
        "runtime": {"hang_timeout": 20},
        "wandb": {"mode": "disabled"},
    }


def write_job(folder: Path, settings: dict[str, Any]) -> Path:
    """Text, tokenizer and run config in `folder`; returns the config, whose output_dir is to be overridden."""
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    corpora = {name: _corpus(folder / f"{name}.txt", seed) for seed, name in enumerate((*DOMAINS, "general"))}
    values = settings | {
        "output_dir": str(folder / "run"),
        "domains": [{"name": name, "train": [corpora[name]], "valid_fraction": 0.15} for name in DOMAINS],
        "general": {"name": "general", "valid": [corpora["general"]]},
        "data": {"sequence_length": 24, "tokenizer": str(folder / "tokenizer"), "cache_dir": str(folder / "cache")},
    }
    path = folder / "chaos.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def _corpus(path: Path, seed: int) -> str:
    # Sentences of some words that the corpora share: domains differ, and yet each helps the others.
    generator = random.Random(seed)
    words = generator.sample(TEXT.split(), 60)
    lines = [" ".join(generator.choices(words, k=14)) for _ in range(LINES)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)
