"""The same config and seed give the same numbers twice; another seed gives others."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.domains.benchmark import reproducible_results
from helpers.run_ranks import run_ranks
from helpers.runs import run_all, small_run


@pytest.mark.multirank
def test_a_run_repeats_its_numbers(tmp_path: Path) -> None:
    def run(name: str, seed: int = 0) -> dict[str, Any]:
        return small_run(tmp_path, method={"importance": {"granularity": "parameter"}}) | {
            "output_dir": tmp_path / name,
            "seed": seed,
        }

    (results,) = run_ranks(run_all, 1, [run("first"), run("again"), run("other", seed=1)])
    first, again, other = map(reproducible_results, results)
    assert first == again
    assert first["loss_matrix"][1:] != other["loss_matrix"][1:]
    assert first.keys() == other.keys() and "wall_seconds" not in first
