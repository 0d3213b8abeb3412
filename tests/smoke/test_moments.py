"""Moments of inputs on real ranks: against float64, saved and read by other ranks, stopped in a later pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from helpers.moment_checks import NUM_ROWS, ONE_PASS, SMALL_BUDGET, check_moments, make_batches
from helpers.moments import (
    break_off_measuring,
    hold_moments,
    moments_config,
    project_with_shared,
    run_in_passes,
    share_shrink,
)
from helpers.resume import assert_same_run, resumable_run
from helpers.run_ranks import run_ranks

pytestmark = pytest.mark.multirank

METHOD = {"name": "directions", "num_samples": 24}


@pytest.mark.parametrize(("world_size", "stage"), [(3, 1), (2, 3)])
def test_moments_equal_float64_at_owners_only(world_size: int, stage: int, tmp_path: Path) -> None:
    found = check_moments(tmp_path, world_size, stage)
    config = moments_config(tmp_path, world_size, stage, NUM_ROWS)
    at_once = run_ranks(hold_moments, world_size, config, make_batches(), ONE_PASS)
    for in_passes, complete in zip(found, at_once, strict=True):
        assert all(moment.equal(complete.moments[name]) for name, moment in in_passes.moments.items())


def test_directions_file_of_one_rank_is_read_by_three_and_back(tmp_path: Path) -> None:
    path = tmp_path / "directions.safetensors"
    (alone,) = run_ranks(hold_moments, 1, moments_config(tmp_path, 1, 2, NUM_ROWS), make_batches(), ONE_PASS, path)
    config = moments_config(tmp_path, 3, 2, NUM_ROWS)
    found = run_ranks(hold_moments, 3, config, make_batches(), ONE_PASS, path)
    assert sum(len(held.moments) for held in found) == len(alone.moments) == 10
    for held in found:
        assert 0 < len(held.moments) < 10
        assert all(moment.equal(alone.moments[name]) for name, moment in held.moments.items())
    # Written by three, read by one.
    other = tmp_path / "other" / "directions.safetensors"
    written = run_ranks(hold_moments, 3, config, make_batches(), ONE_PASS, other)
    (read,) = run_ranks(hold_moments, 1, moments_config(tmp_path, 1, 2, NUM_ROWS), make_batches(), ONE_PASS, other)
    for held in written:
        assert all(moment.equal(read.moments[name]) for name, moment in held.moments.items())
    assert [entry.name for entry in other.parent.iterdir()] == [other.name]


@pytest.mark.parametrize(("owner", "users"), [(1, (0, 1, 2)), (2, (0,)), (0, (0, 2)), (1, (1,)), (1, ())])
def test_share_projector_reaches_users_only(owner: int, users: tuple[int, ...]) -> None:
    found = run_ranks(share_shrink, 3, owner, users)
    expected = torch.arange(6, dtype=torch.bfloat16).view(3, 2).T
    for rank, received in enumerate(found):
        assert (received is not None) == (rank in users)
        if received is not None:
            assert received[0].equal(expected) and received[0].dtype == torch.bfloat16 and received[1] == 0.25


def test_products_with_a_shared_projector_are_bitwise_equal_on_all_ranks() -> None:
    """At ZeRO 0 every rank steps a copy of all weights, and nothing makes the copies equal again."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(40, 8, generator=generator)
    vectors = torch.randn(100, 8, generator=generator)
    found = run_ranks(project_with_shared, 2, 1, inputs.T @ inputs / 40, vectors)
    assert found[0].equal(found[1])


def keys_of(checkpoint: Path) -> dict[str, set[str]]:
    """Kind -> names of the tensors of all ranks."""
    found: dict[str, set[str]] = {}
    for path in checkpoint.glob("rank_*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (no dictionary)
                kind, component, name, *_ = key.split("|")
                found.setdefault(f"{kind}|{component}", set()).add(name)
    return found


def test_stopped_in_second_pass_resumes_bitwise_and_on_other_ranks(tmp_path: Path) -> None:
    """On two ranks at ZeRO 2, in the second domain; then on one rank at ZeRO 3 from the same checkpoint."""

    def values(name: str, **changes: Any) -> dict[str, Any]:
        return {**resumable_run(tmp_path, name, method=METHOD, asynchronous=False), **changes}

    run_ranks(run_in_passes, 2, [values("complete")], SMALL_BUDGET)
    for name in ("parts", "other"):
        # Six batches a pass: five save points, and the third of the second pass.
        place = run_ranks(break_off_measuring, 2, values(name), SMALL_BUDGET, 1, 8)[0]
        assert place[:2] == ("after", 1)
        checkpoint = max((tmp_path / name / "checkpoints").iterdir(), key=lambda path: path.name)
        saved = keys_of(checkpoint)
        owned = saved["owned|method"]
        # The sum over the first domain, and the first group of the second; the second group is in the loop.
        assert len([key for key in owned if key.startswith("total/")]) == 10
        assert len([key for key in owned if key.startswith("latest/")]) == 3
        sums = [key for key in saved["rank_local|loops"] if not key.startswith("rng/")]
        assert len(sums) == 1 and "output.dense" in sums[0]
        done = json.loads((checkpoint / "manifest.json").read_text())["metadata"]["loops"]["done"]
        assert [label for label, _ in done] == ["inputs of papers, part 1 of 5", "inputs of papers, part 2 of 5"]
    run_ranks(run_in_passes, 2, [values("parts")], SMALL_BUDGET)
    assert_same_run(tmp_path / "parts", tmp_path / "complete")
    zero3 = {"zero_optimization": {"stage": 3}}
    run_ranks(run_in_passes, 1, [values("other", deepspeed=zero3)], SMALL_BUDGET)
    with (
        safe_open(tmp_path / "other" / "directions.safetensors", framework="pt") as found,
        safe_open(tmp_path / "complete" / "directions.safetensors", framework="pt") as expected,
    ):
        assert set(found.keys()) == set(expected.keys())
        for name in expected.keys():  # noqa: SIM118 (no dictionary)
            torch.testing.assert_close(found.get_tensor(name), expected.get_tensor(name), rtol=1e-3, atol=1e-3)
