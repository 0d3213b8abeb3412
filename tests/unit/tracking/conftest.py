"""Fixture: a run config with two domains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from das_ds.config import RunConfig


def _config(folder: Path, mode: str) -> RunConfig:
    folder.mkdir(parents=True, exist_ok=True)
    return RunConfig.model_validate(
        {
            "output_dir": str(folder),
            "model": {"name_or_path": "roberta-base"},
            "domains": [{"name": "acl", "train": ["acl.txt"]}, {"name": "pub-med", "train": ["pubmed.txt"]}],
            "general": {"name": "general", "valid": ["general.txt"]},
            "method": {"name": "ncl"},
            "wandb": {"mode": mode, "project": "tests"},
        }
    )


@pytest.fixture(scope="session")
def make_config() -> Callable[[Path, str], RunConfig]:
    """(run folder, W&B mode) -> config; makes the folder."""
    return _config
