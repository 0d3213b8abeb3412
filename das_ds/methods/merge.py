"""Merging: weights averaged with those from before the domain (CoMA: Marouf et al., ECCV 2024, arXiv 2312.08977)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from das_ds.config import MethodConfig
from das_ds.distributed.state import ComponentState, Flats, SavedComponentState
from das_ds.methods.base import Method
from das_ds.methods.wrapper import MethodWrapper
from das_ds.models.size import FP32, MemoryUse, ModelSize, Sharding

if TYPE_CHECKING:
    from das_ds.context import DomainContext, RunContext

BEFORE = "before"


class MergeMethodConfig(MethodConfig):
    """Naive training with weights averaged after each domain, `merge.weight` 0.5 by default."""

    default_merge_weight = 0.5

    name: Literal["merge"] = "merge"


class ModelMerging(Method[MergeMethodConfig]):
    """Naive training with `MergingWrapper` after each domain, which any method can have; this one has a default."""

    Config = MergeMethodConfig


class MergingWrapper(MethodWrapper):
    """Any method, and after each domain theta <- (1 - c) * theta + c * theta_before, c = `merge.weight`.

    The weight-space ensemble of Wortsman et al. (WiSE-FT, CVPR 2022), applied after each domain to the model that the
    domain started from (CoMA: Marouf et al., ECCV 2024; MC-WiSE: Stojanovski et al., 2022, arXiv 2211.03186). `average`
    is c = t / (t + 1) after domain t = 1, 2, ...: the mean of the base model and all models at the end of a domain, as
    stochastic weight averaging keeps it (Izmailov et al., UAI 2018, algorithm 1). Importance is measured on the merged
    weights, which are exported, evaluated and passed on to the next domain. With LoRA the factors are averaged, not
    their product.

    Keeps one host copy of each rank's fp32 shard while a domain is learned. Extra compute: one pass over the weights
    per domain.

    Args:
        method: the method that trains.
        weight: c.
    """

    def __init__(self, method: Method[Any], weight: float | Literal["average"]) -> None:
        super().__init__(method)
        self._weight = weight
        self._before: Flats | None = None

    def before_domain(self, domain: DomainContext) -> None:
        """Copy the weights from which the domain starts."""
        self._before = copy_weights(self.run)
        self._method.before_domain(domain)

    def after_domain(self, domain: DomainContext) -> None:
        """Merge once, and drop the copy with it: a checkpoint has either unmerged weights or nothing to merge."""
        if self._before is not None:
            weight = merge_weight(self._weight, domain.index + 1)
            with self.run.engine.weights.writable_flats() as weights:
                for flat, values in weights.items():
                    values.lerp_(self._before[flat].to(values.device), weight)
            self._before = None
        self._method.after_domain(domain)

    def state_dict(self) -> ComponentState:
        """State of the method, and within a domain the weights from before it."""
        state = self._method.state_dict()
        return state if self._before is None else replace(state, sharded={**state.sharded, BEFORE: self._before})

    def load_state_dict(self, saved: SavedComponentState) -> None:
        """Continue from any sharding."""
        self._method.load_state_dict(saved)
        self._before = load_weights(saved)


def copy_weights(run: RunContext) -> Flats:
    """Host copy of this rank's fp32 weights, which a method saves as `BEFORE`."""
    return {flat: weights.to("cpu", copy=True) for flat, weights in run.engine.weights.flats().items()}


def load_weights(saved: SavedComponentState) -> Flats | None:
    """The copy in a checkpoint, from any sharding; None where there was none."""
    before = saved.sharded(BEFORE) if saved.has_sharded(BEFORE) else None
    return before and {flat: values.cpu() for flat, values in before.items()}


def merging_memory(size: ModelSize, sharding: Sharding) -> MemoryUse:
    """Copy of the weights from before the domain, within one."""
    weights = FP32 * size.trained
    return MemoryUse(host={"weights before the domain": weights // sharding.optimizer_shards}, checkpoint=weights)


def merge_weight(weight: float | Literal["average"], num_learned: int) -> float:
    """c of theta <- (1 - c) * theta + c * theta_before.

    `average` gives c = t / (t + 1), so that by induction theta_t is the mean of t + 1 models: the base and those at the
    end of domains 1 to t (the running average of Izmailov et al., UAI 2018, algorithm 1).

    Args:
        weight: c, or `average`.
        num_learned: t, domains learned so far, including the present one.
    """
    return num_learned / (num_learned + 1) if weight == "average" else weight
