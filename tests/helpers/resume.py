"""Runs that break off at chosen boundaries, as a killed process does, and are started again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from das_ds.checkpointing.manifest import RunState
from das_ds.config import RunConfig
from das_ds.distributed.launch import Ranks
from das_ds.errors import DasError
from das_ds.evaluation.results import Results
from das_ds.tracking.names import MEASURED
from das_ds.training.boundary import Boundary, Parts
from das_ds.training.run import run_sequence
from helpers.half import allow_fp16_on_cpu
from helpers.runs import metrics_lines

MOST_BREAKS = 100
Place = tuple[str, int, int]
"""Phase, domains done, step."""


class BrokenOffError(DasError):
    """Nothing is saved, closed or told to anybody."""


def run_in_pieces(values: dict[str, Any], limit: int) -> tuple[Results, list[Place]]:
    """Every start breaks off at its boundary number `limit` until one comes to the end; where each of them stood."""
    allow_fp16_on_cpu()
    ranks, config, breaks = Ranks(), RunConfig(**values), list[Place]()
    while len(breaks) < MOST_BREAKS:
        with suppress(BrokenOffError):
            return _limited_run(config, ranks, limit, breaks), breaks
    raise AssertionError(f"no progress: {breaks[-5:]}")


def _limited_run(config: RunConfig, ranks: Ranks, limit: int, breaks: list[Place]) -> Results:
    pass_by, passed = Boundary.pass_by, 0

    def limited(self: Boundary, run: RunState, parts: Callable[[], Parts], *, save: bool) -> None:
        nonlocal passed
        pass_by(self, run, parts, save=save)
        passed += 1
        if passed == limit:
            breaks.append((run.phase, run.domains_done, run.domain_step))
            raise BrokenOffError

    Boundary.pass_by = limited  # type: ignore[method-assign]
    try:
        return run_sequence(config, ranks)
    finally:
        Boundary.pass_by = pass_by  # type: ignore[method-assign]


def break_off(values: dict[str, Any], limit: int) -> Place | None:
    """One start that breaks off at boundary number `limit`: where it stood; None where it came to the end before."""
    allow_fp16_on_cpu()
    breaks: list[Place] = []
    with suppress(BrokenOffError):
        _limited_run(RunConfig(**values), Ranks(), limit, breaks)
    return breaks[0] if breaks else None


def assert_same_run(mine: Path, theirs: Path) -> None:
    """Models, importance, results and metrics agree bit for bit, but for what tells of the machine."""
    found_files = (path.relative_to(theirs) for path in theirs.rglob("*.safetensors"))
    files = sorted(path for path in found_files if path.parts[0] != "checkpoints")
    assert files, f"found nothing in {theirs}"
    for file in files:
        found, expected = load_file(mine / file), load_file(theirs / file)
        assert found.keys() == expected.keys(), file
        for name, value in expected.items():
            assert found[name].equal(value), f"{file}: {name}"
    results = [Results.read(run / "results.json").model_copy(update={"wall_seconds": 0.0}) for run in (mine, theirs)]
    assert results[0] == results[1]
    lines = [
        [{k: v for k, v in line.items() if k not in MEASURED} for line in metrics_lines(run)] for run in (mine, theirs)
    ]
    assert lines[0] == lines[1]
