"""What a method keeps beside model and optimizer, but for importance."""

from __future__ import annotations

from das_ds.config import RunConfig
from das_ds.functional.sizes import ModelSize
from das_ds.methods.answered_rows import row_layout


def kept_by_rank(config: RunConfig, size: ModelSize, *, stage: int, num_ranks: int) -> dict[str, int]:
    """Part -> bytes of one rank, where it computes."""
    if config.method.name == "kd":
        return {"teacher": _teacher_bytes(config, size) // (num_ranks if stage == 3 else 1)}
    if config.method.name == "derpp":
        return {"buffer": -(-config.method.derpp.capacity // num_ranks) * _row_bytes(config, size)}
    return {}


def kept_in_checkpoint(config: RunConfig, size: ModelSize, *, in_domain: bool) -> int:
    """Bytes over all ranks, of a checkpoint within a domain or of that at its end."""
    if config.method.name == "kd" and in_domain:
        return _teacher_bytes(config, size)
    if config.method.name == "derpp":
        return config.method.derpp.capacity * _row_bytes(config, size)
    return 0


def _teacher_bytes(config: RunConfig, size: ModelSize) -> int:
    return (4 if config.train.precision == "fp32" else 2) * size.trained


def _row_bytes(config: RunConfig, size: ModelSize) -> int:
    return 4 * row_layout(config, size.hidden).width
