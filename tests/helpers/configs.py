"""Small run configs: one base, changed by the product's own overrides or by nested dictionaries of keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from das_ds.config import RunConfig
from das_ds.config.io import dump_config, parse_config

DEFAULT_METHOD = "das"
LENGTH = 12
"""Tokens of a sequence."""


def make_config(folder: str | Path, *overrides: str) -> RunConfig:
    """A small run on text that is never read, such as `make_config(tmp_path, "method=ewc", "train.precision=bf16")`."""
    return parse_config(base_values(folder), overrides)


def base_values(folder: str | Path) -> dict[str, Any]:
    """Values of the run of `make_config`."""
    return {
        "output_dir": folder,
        "model": {"config": {"model_type": "roberta"}},
        "domains": [{"name": "domain", "train": ["unused.txt"]}],
        "data": {"sequence_length": LENGTH},
        "train": {
            "steps_per_domain": 5,
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "learning_rate": 1e-2,
            "precision": "fp32",
            "log_interval": 1,
            "max_grad_norm": 0.5,
        },
        "method": {"view_dropout": 0.0},
        "deepspeed": {"zero_optimization": {"stage": 0}},
    }


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Values with the keys of `changes` in each section; the section of another method replaces that of the first."""
    result = dict(values)
    for key, value in changes.items():
        is_section = isinstance(value, dict) and isinstance(values.get(key), dict)
        is_other_method = key == "method" and _name(value) != _name(values.get(key, {}))
        result[key] = {**values[key], **value} if is_section and not is_other_method else value
    return result


def _name(method: Any) -> str:
    return str(method.get("name", DEFAULT_METHOD) if isinstance(method, dict) else method)


def record_continued(folder: Path, earlier: tuple[str, ...], after: str, own: tuple[str, ...]) -> tuple[Path, Path]:
    """Two run folders with their configs: one that learned `earlier`, and one that continues it with `own` domains."""
    first = folder / "first"
    beginning = {**base_values(first), "domains": [{"name": name, "train": ["unused.txt"]} for name in earlier]}
    following = {
        "output_dir": folder / "next",
        "continue_from": {"run": first, "after": after},
        "domains": [{"name": name, "train": ["unused.txt"]} for name in own],
    }
    for values in (beginning, following):
        config = parse_config(values, [])
        config.output_dir.mkdir()
        dump_config(config, config.output_dir / "config.yaml")
    return first, folder / "next"
