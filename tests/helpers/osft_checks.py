"""OSFT over two domains, by the engine on real ranks against float64."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.parity import parity_configs, relative_difference
from helpers.run_ranks import run_ranks
from helpers.two_domains import Expected, learn_all, learn_plainly, make_domains

NUM_ROWS = 6
"""Of a micro-batch: one, two and three ranks read as many each."""
# Of 24 directions 16 are frozen, so that a square matrix is stored with the others; or 7, with these.
RATIOS = (0.3, 0.7)
TOLERANCES = (2e-5, 2e-4)
"""After each domain: what weights differ by at its start changes their singular vectors by as much, divided by the gap
between two singular values, at least 0.2 % of the largest one."""


@cache
def expected(ratio: float | None) -> Expected:
    return learn_plainly(make_domains(NUM_ROWS), unfreeze_rank_ratio=ratio)


def check_osft(folder: Path, world_size: int, zero: dict[str, Any], precisions: tuple[str, ...] = ()) -> None:
    """Weights after both domains and norms of all gradients, in fp32; movements in other precisions."""
    methods = [{"name": "osft", "unfreeze_rank_ratio": ratio} for ratio in RATIOS]
    configs = [
        parity_configs(folder, world_size, zero, methods, precision, num_rows=NUM_ROWS)
        for precision in ("fp32", *precisions)
    ]
    runs = [config for of_precision in configs for config in of_precision]
    found = run_ranks(learn_all, world_size, runs, make_domains(NUM_ROWS))[0]
    for config, ratio, run in zip(runs, RATIOS * len(configs), found, strict=True):
        true = expected(ratio)
        norms = [line["grad_norm"] for line in run.lines]
        if config.train.precision == "fp32":
            for mine, theirs, tolerance in zip(run.weights, true.weights, TOLERANCES, strict=True):
                assert relative_difference(mine, theirs) <= tolerance
            assert norms == pytest.approx(true.grad_norms, rel=1e-4)
            continue
        # The gradient of a key's bias is rounding alone.
        moved, exact = (
            torch.cat([(second[n] - first[n]).flatten().double() for n in first if "key.bias" not in n])
            for first, second in (run.weights, true.weights)
        )
        assert torch.nn.functional.cosine_similarity(moved, exact, dim=0) > 0.97
        assert norms == pytest.approx(true.grad_norms, rel=0.05)
