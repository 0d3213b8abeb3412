"""The benchmark of generated text: the configs of its variants, and the summary of their results by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.generated_replay import DOMAINS, VARIANTS, run_values, summarize
from das_ds.config import RunConfig


@pytest.mark.parametrize("name", list(VARIANTS))
def test_variants_are_configs_that_differ_in_what_they_replay_and_protect(name: str) -> None:
    values = run_values(Path("runs"), Path("data"), DOMAINS, steps=5, rate=1e-3, seed=1)
    general = {"name": "general", "train": ["general.txt"], "valid": ["valid.txt"]}
    config = RunConfig.model_validate(
        {
            **values,
            "model": {"name_or_path": "base"},
            "general": general,
            "method": VARIANTS[name],
        }
    )
    first, second = DOMAINS
    assert config.method.name == ("directions" if "directions" in name else "ncl")
    assert config.replays_generated(first) == ("generated, " in name)
    expected = {"real text, ce": [first, "general"]}
    assert config.replayed(second) == expected.get(name, [])
    replays = "generated" in name or "real text" in name
    assert config.own_samples_per_step(first) == (12 if replays else 16)


def test_summarize_by_hand() -> None:
    """Columns are the two domains and general text."""
    matrices = [
        [[5.0, 6.0, 4.0], [3.0, 5.5, 4.5], [3.5, 4.0, 5.0]],
        [[5.0, 6.0, 4.0], [3.2, 5.5, 4.5], [3.5, 4.2, 4.8]],
    ]
    runs: list[Any] = [SimpleNamespace(loss_matrix=matrix, wall_seconds=10.0) for matrix in matrices]
    row = summarize("naive", runs)
    assert row["loss after learning"] == pytest.approx((3.0 + 4.0 + 3.2 + 4.2) / 4)
    assert row["general loss, change"] == pytest.approx(0.9)
    assert row["sd"] == pytest.approx(0.2 / 2**0.5)
    assert row["first domain, change"] == pytest.approx((0.5 + 0.3) / 2)
    assert row["final loss, all"] == pytest.approx((12.5 + 12.5) / 6)
    assert row["seeds"] == 2 and row["seconds"] == 10.0
    assert summarize("naive", runs[:1])["sd"] == 0.0
