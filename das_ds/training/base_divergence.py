"""How far a run has moved the model's predictions on new text: their divergence from those before the first domain.

Shape legend: P predicted positions of a batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from das_ds.config import RunConfig
from das_ds.config.stage import Stage
from das_ds.context import RunContext
from das_ds.distributed.collectives import all_reduce_sum
from das_ds.distributed.resumable import ResumableLoops
from das_ds.distributed.state import ComponentState, Flats, SavedComponentState
from das_ds.errors import ConfigError
from das_ds.models.lm_loss import Distillation
from das_ds.models.size import MemoryUse, ModelSize, Sharding
from das_ds.training.data_module import DataModule

if TYPE_CHECKING:
    from das_ds.data.batch import Batch
    from das_ds.engine.weight_snapshot import WeightSnapshot

BASE = "base"
TOTAL = "total"


class BaseDivergence:
    """KL(base || model), the mean over held-out predicted tokens of a domain that was just learned:

        KL(p_base || p) = sum_v p_base(v) ln(p_base(v) / p(v))    in nats

    the base being the model before the first domain. How much a model forgets follows it over methods and learning
    rates (Shenfeld et al., RL's razor: why online reinforcement learning forgets less, 2025, arXiv 2509.04259, whose
    predictor it is). It needs no text of what may be forgotten.

    Keeps the base weights in host memory, in the type of training, sharded like the optimizer, and in checkpoints.
    While it measures, they are on the device as a second model. Costs two forward passes over the held-out text of each
    domain.

    Args:
        context: network and engine.
        data: held-out text.
        loops: over its batches.

    Raises:
        ConfigError: an LM head that does not end in a plain linear layer.
    """

    def __init__(self, context: RunContext, data: DataModule, loops: ResumableLoops) -> None:
        if not context.network.can_distill:
            raise ConfigError(
                "evaluation.base_divergence: found true with an LM head that does not end in a plain linear layer, "
                "because of its architecture or because LoRA wraps it; allowed there: false"
            )
        self._context = context
        self._data = data
        self._loops = loops
        self._base: Flats = {}

    def keep_base(self) -> None:
        """The present model is the base."""
        snapshot = self._context.engine.weights.weight_snapshot()
        self._base = {flat: values.cpu() for flat, values in snapshot.flats().items()}

    def measure(self, stage: Stage) -> float | None:
        """The divergence on held-out text of all domains of a stage; a collective. None: base or text is gone.

        Text is read with the tokens that its domain knows, which may be more than the base knew: to the base these are
        like the mean of its tokens.
        """
        if not self._base or any(domain not in self._data.blocks for domain in stage.domains):
            return None
        base = self._context.engine.weights.weight_snapshot(self._base)
        network = self._context.network
        device = self._data.info.device
        was_training = network.training
        network.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=device)
        for domain in stage.domains:
            network.num_rows = self._data.num_rows(domain)
            batches = self._loops.start(self._data.evaluation_batches(domain), f"divergence {domain}")
            # (sum of divergences, number of tokens)
            total = batches.accumulators.setdefault(TOTAL, torch.zeros(2, dtype=torch.float64, device=device))
            for batch in batches:
                total[0] += self._divergences(batch.to(device), base).sum()
                total[1] += batch.num_predicted
            totals += total
        network.train(was_training)
        divergence, count = all_reduce_sum(totals).tolist()
        return float(divergence / count)

    @torch.no_grad()
    def _divergences(self, batch: Batch, base: WeightSnapshot) -> torch.Tensor:
        """(P,) of each predicted position."""
        network = self._context.network
        inputs = (batch.corrupted_ids, batch.predicted, batch.targets, batch.position_ids)
        with base.swapped_in(), network.capturing_logits() as captured:
            network(*inputs)
        positions = torch.arange(len(batch.predicted), device=batch.predicted.device)
        comparison = Distillation(positions, captured[0])
        with network.distilling(comparison):
            network(*inputs)
        assert comparison.divergences is not None, "the network was called"
        return comparison.divergences.double()

    def state_dict(self) -> ComponentState:
        """The base weights."""
        return ComponentState(sharded={BASE: self._base} if self._base else {})

    def load_state_dict(self, saved: SavedComponentState) -> None:
        """Continue from any sharding."""
        if saved.has_sharded(BASE):
            self._base = {flat: values.cpu() for flat, values in saved.sharded(BASE).items()}


def base_divergence_memory(config: RunConfig, size: ModelSize, sharding: Sharding) -> MemoryUse:
    """Memory and disk space of `BaseDivergence`, where a run has it."""
    if not config.evaluation.base_divergence:
        return MemoryUse()
    weights = sharding.weight_bytes * size.trained
    return MemoryUse(
        host={"base weights": weights // sharding.optimizer_shards},
        device_at_start={"base weights while they are compared": weights // sharding.weight_shards},
        checkpoint=weights,
    )
