"""What a method keeps beside model and optimizer, but for importance."""

from __future__ import annotations

from das_ds.config import RunConfig
from das_ds.functional.sizes import ModelSize, Sharding
from das_ds.methods.answered_rows import row_layout

EWC_BYTES, MERGE_BYTES = 8, 4
"""Of each trained weight: fp32 Fisher information and anchor; fp32 weight from before the domain."""


def kept_by_rank(config: RunConfig, size: ModelSize, sharding: Sharding) -> tuple[dict[str, int], dict[str, int]]:
    """(part -> bytes of one rank where it computes, part -> bytes in host memory)."""
    shards = sharding.num_ranks if sharding.stage >= 1 else 1
    if config.method.name == "ewc":
        fisher = {"Fisher information": EWC_BYTES * size.trained // shards}
        return ({}, fisher) if sharding.offloads_optimizer else (fisher, {})
    if config.method.name == "kd":
        return {"teacher": _teacher_bytes(config, size) // (sharding.num_ranks if sharding.stage == 3 else 1)}, {}
    if config.method.name == "derpp":
        return {"buffer": -(-config.method.derpp.capacity // sharding.num_ranks) * _row_bytes(config, size)}, {}
    if config.method.name == "merge":
        return {}, {"weights before the domain": MERGE_BYTES * size.trained // shards}
    return {}, {}


def kept_in_checkpoint(config: RunConfig, size: ModelSize, *, in_domain: bool) -> int:
    """Bytes over all ranks, of a checkpoint within a domain or of that at its end."""
    if config.method.name == "ewc":
        # The anchor goes with the domain.
        return (EWC_BYTES if in_domain else EWC_BYTES // 2) * size.trained
    if config.method.name == "kd" and in_domain:
        return _teacher_bytes(config, size)
    if config.method.name == "merge" and in_domain:
        return MERGE_BYTES * size.trained
    if config.method.name == "derpp":
        return config.method.derpp.capacity * _row_bytes(config, size)
    return 0


def _teacher_bytes(config: RunConfig, size: ModelSize) -> int:
    return (4 if config.train.precision == "fp32" else 2) * size.trained


def _row_bytes(config: RunConfig, size: ModelSize) -> int:
    return 4 * row_layout(config, size.hidden).width
