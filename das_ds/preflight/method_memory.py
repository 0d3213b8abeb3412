"""What a method keeps beside model and optimizer, but for importance."""

from __future__ import annotations

from das_ds.config import RunConfig
from das_ds.methods.replay_records import record_layout
from das_ds.preflight.memory_estimate import ModelSize, Sharding

EWC_BYTES, MERGE_BYTES, OLD_BYTES = 8, 4, 4
"""Of each trained weight: fp32 Fisher information and anchor; fp32 weight from before the domain, or the step."""


def kept_by_rank(config: RunConfig, size: ModelSize, sharding: Sharding) -> tuple[dict[str, int], dict[str, int]]:
    """(part -> bytes of one rank where it computes, part -> bytes in host memory)."""
    shards = sharding.num_ranks if sharding.stage >= 1 else 1
    own, beside_weights, host = dict[str, int](), dict[str, int](), dict[str, int]()
    if config.method.name == "ewc":
        beside_weights["Fisher information"] = EWC_BYTES * size.trained // shards
    if config.method.name == "kd":
        own["teacher"] = _teacher_bytes(config, size) // (sharding.num_ranks if sharding.stage == 3 else 1)
    if config.method.name == "derpp":
        own["buffer"] = -(-config.method.derpp.capacity // sharding.num_ranks) * _row_bytes(config, size)
    if config.method.masks_directions:
        host["moments of inputs"] = _moment_bytes(size)
        beside_weights["direction masks"] = _moment_bytes(size)
        beside_weights["weights before the step"] = OLD_BYTES * size.trained // shards
    if config.method.merging is not None:
        host["weights before the domain"] = MERGE_BYTES * size.trained // shards
    return (own, host | beside_weights) if sharding.offloads_optimizer else (own | beside_weights, host)


def kept_in_checkpoint(config: RunConfig, size: ModelSize, *, in_domain: bool) -> int:
    """Bytes over all ranks, of a checkpoint within a domain or of that at its end."""
    total = 0
    if config.method.name == "ewc":
        # The anchor goes with the domain.
        total += (EWC_BYTES if in_domain else EWC_BYTES // 2) * size.trained
    if config.method.name == "kd" and in_domain:
        total += _teacher_bytes(config, size)
    if config.method.name == "derpp":
        total += config.method.derpp.capacity * _row_bytes(config, size)
    if config.method.masks_directions:
        total += _moment_bytes(size)
    if config.method.merging is not None and in_domain:
        total += MERGE_BYTES * size.trained
    return total


def _moment_bytes(size: ModelSize) -> int:
    """About: per layer five matrices read the hidden states and one the neurons; two more belong to the LM head."""
    return 4 * (size.num_layers * (5 * size.hidden**2 + size.inner**2) + 2 * size.hidden**2)


def _teacher_bytes(config: RunConfig, size: ModelSize) -> int:
    return (4 if config.train.precision == "fp32" else 2) * size.trained


def _row_bytes(config: RunConfig, size: ModelSize) -> int:
    return 4 * record_layout(config, size.hidden).width
