"""The checks of kept moments for one stage, number of ranks and precision."""

from __future__ import annotations

from pathlib import Path

from das_ds.config import RunConfig
from helpers.kept_moments import FACTOR, mask_kept_moments, train_once_and_divided
from helpers.parity import ACCUMULATION, EPS, ROWS, relative_difference
from helpers.run_ranks import run_ranks
from helpers.training import run_config


def kept_config(folder: Path, stage: int, world_size: int, **train: object) -> RunConfig:
    """A run at a constant rate whose optimizer is not reset, so that borders of domains should not matter."""
    return run_config(
        folder,
        method={"name": "ncl"},
        deepspeed={"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}},
        train={
            "micro_batch_size": ROWS // world_size,
            "global_batch_size": ROWS * ACCUMULATION,
            "lr_scheduler": "constant_with_warmup",
            "warmup_ratio": 0.0,
            "reset_optimizer": False,
            "eps": EPS,
            **train,
        },
    )


def check_divided_run_equals_one(
    folder: Path, stage: int, world_size: int, precision: str, optimizer: str = "adamw", timeout: float = 240.0
) -> None:
    """Bit for bit with kept moments, and clearly not with reset ones."""
    config = kept_config(folder, stage, world_size, precision=precision, optimizer=optimizer)
    for once, kept, reset in run_ranks(train_once_and_divided, world_size, config, timeout=timeout):
        assert all(kept[name].equal(value) for name, value in once.items())
        assert relative_difference(reset, once) > 1e-3


def check_kept_moments_are_masked(folder: Path, stage: int, world_size: int) -> None:
    """A mask of gradients is one of the first moment, their mean, and not of the second, of weights or step counts."""
    for state in run_ranks(mask_kept_moments, world_size, kept_config(folder, stage, world_size)):
        before, after = state.pop("moment/exp_avg")
        assert before.abs().max() > 0 and after.equal(before * FACTOR)
        assert state.keys() == {"weights", "moment/exp_avg_sq", "step"}
        assert all(old.equal(new) for old, new in state.values())
