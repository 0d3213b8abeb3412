"""Weights of earlier steps of a domain that it may end with: the best ones, and the last that kept the limits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from das_ds.config import RunConfig
from das_ds.distributed.state import ComponentState, Flats, SavedComponentState
from das_ds.models.size import FP32, MemoryUse, ModelSize, Sharding

if TYPE_CHECKING:
    from das_ds.engine.weights import ShardedWeights

KeptName = Literal["best", "within_limits"]
"""Weights of the best step, and of the last step that kept the limits on forgetting."""
NAMES: tuple[KeptName, ...] = ("best", "within_limits")


class KeptWeights:
    """Copies of this rank's fp32 shards in host memory, and within a domain a component of checkpoints.

    Why not the checkpoints themselves, to which a loss spike returns: training does not go on from these weights, so
    that neither moments nor data nor random generators are needed, and checkpoints of the domain may be pruned.

    Args:
        weights: of the engine.
    """

    def __init__(self, weights: ShardedWeights) -> None:
        self._weights = weights
        self._kept: dict[str, Flats] = {}

    def keep(self, name: KeptName) -> None:
        """Copy the present weights, in place of earlier ones of this name."""
        # New tensors: a checkpoint that is being written reads the old ones.
        self._kept[name] = {flat: values.to("cpu", copy=True) for flat, values in self._weights.flats().items()}

    def restore(self, name: KeptName) -> None:
        """Make the weights of this name the present ones."""
        self._weights.load(self._kept[name])

    def clear(self) -> None:
        """Forget all copies: the domain is over."""
        self._kept = {}

    def state_dict(self) -> ComponentState:
        """All copies."""
        return ComponentState(sharded=dict(self._kept))

    def load_state_dict(self, saved: SavedComponentState) -> None:
        """Continue from any sharding."""
        found = {name: saved.sharded(name) for name in NAMES if saved.has_sharded(name)}
        self._kept = {name: {flat: values.cpu() for flat, values in flats.items()} for name, flats in found.items()}


def kept_memory(config: RunConfig, size: ModelSize, sharding: Sharding) -> MemoryUse:
    """Memory and disk space of `KeptWeights`, and of a second model per domain where one is exported."""
    limits = config.faults.max_forgetting
    is_kept = {
        "weights of the best step": config.evaluation.selects_best,
        "weights within the limits": limits is not None and limits.action == "rollback",
    }
    weights = FP32 * size.trained
    return MemoryUse(
        host={name: weights // sharding.optimizer_shards for name, kept in is_kept.items() if kept},
        checkpoint=weights * sum(is_kept.values()),
        domain=FP32 * size.total if config.evaluation.keep_best else 0,
    )
