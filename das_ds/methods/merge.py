"""Weights averaged with those from before the domain (CoMA: Marouf et al., ECCV 2024, arXiv 2312.08977)."""

from __future__ import annotations

from das_ds.distributed.state import Flats, RankState, SavedState
from das_ds.functional.merging import share_of_earlier
from das_ds.methods.base import DomainContext, Method
from das_ds.methods.context import RunContext

BEFORE = "before"


class Merged(Method):
    """Naive training, and after each domain theta <- (1 - c) * theta + c * theta_before, c = `merge.coefficient`.

    The weight-space ensemble of Wortsman et al. (WiSE-FT, CVPR 2022), applied after each domain to the model that the
    domain started from (CoMA: Marouf et al., ECCV 2024; MC-WiSE: Stojanovski et al., 2022, arXiv 2211.03186). `average`
    is c = t / (t + 1) after domain t = 1, 2, ...: the mean of the base model and all models at the end of a domain, as
    stochastic weight averaging keeps it (Izmailov et al., UAI 2018, algorithm 1). Merged weights are what is exported
    and evaluated, and what the next domain starts from. With LoRA the factors are averaged, not their product.

    Keeps one host copy of each rank's fp32 shard while a domain is learned. Extra compute: one pass over the weights
    per domain.
    """

    def __init__(self, run: RunContext) -> None:
        super().__init__(run)
        self._before: Flats | None = None

    def before_domain(self, domain: DomainContext) -> None:
        """Remember where the domain starts."""
        self._before = {flat: weights.to("cpu", copy=True) for flat, weights in self.run.engine.weights().items()}

    def after_domain(self, domain: DomainContext) -> None:
        """Merge; what was remembered goes, so that a checkpoint holds either unmerged weights or nothing to merge."""
        assert self._before is not None, "before_domain comes before after_domain"
        share = share_of_earlier(self.run.config.method.merge.coefficient, domain.index + 1)
        with self.run.engine.changing_weights() as weights:
            for flat, values in weights.items():
                values.lerp_(self._before[flat].to(values.device), share)
        self._before = None

    def state(self) -> RankState:
        """Where the present domain started, within one."""
        return RankState(sharded={} if self._before is None else {BEFORE: self._before})

    def load_state(self, saved: SavedState) -> None:
        """However it was divided."""
        before = saved.sharded(BEFORE) if saved.has_sharded(BEFORE) else None
        self._before = before and {flat: values.cpu() for flat, values in before.items()}
