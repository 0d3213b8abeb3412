"""Importance of single weights (SPG: Konishi et al., Parameter-Level Soft-Masking for Continual Learning, ICML 2023).

Shape legend: B sequences of a micro-batch, G of a batch that gives one gradient, N of the sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from das_ds.config import ImportanceScore, SoftmaskConfig
from das_ds.context import DomainContext, RunContext
from das_ds.data.batch import Batch
from das_ds.distributed.resumable import ResumableLoop
from das_ds.distributed.state import ComponentState, Flats, SavedComponentState
from das_ds.functional.units import UnitValues
from das_ds.softmask.importance import ImportanceLevel
from das_ds.softmask.importance_file import load_parameter_importance, save_parameter_importance
from das_ds.softmask.measure import TOTALS, ImportanceLoss, count_and_sum, is_above_noise_floor
from das_ds.softmask.sharded_importance import ShardedImportance

IMPORTANCE = "importance"


class ParameterLevel(ImportanceLevel[ShardedImportance]):
    """One byte per weight, sharded like the optimizer; every parameter counts, owned by a unit or not."""

    def measure(self, domain: DomainContext, label: str, loss: ImportanceLoss) -> ShardedImportance:
        """Sum over the gradients of the sample's batches, normalised."""
        engine = self.run.engine
        return ShardedImportance.from_magnitudes(
            engine.named_shards,
            self.run.layout.sizes_with(self.run.network.num_rows),
            engine.ranks.info.device,
            sum_over_gradients(self.run, domain.sample_steps(label), loss, self.run.config.method.importance.score),
            self.run.layout.owners,
            self.run.config.method.importance,
        )

    def maximum(self, new: ShardedImportance, accumulated: ShardedImportance | None) -> ShardedImportance:
        """EMax in the shard."""
        return new.maximum(accumulated)

    def by_unit(self, importance: ShardedImportance) -> UnitValues:
        """Mean over the weights that a unit owns."""
        return importance.by_unit(self.run.layout)

    def protect(self, importance: ShardedImportance, softmask: SoftmaskConfig) -> None:
        """Mask element by element."""
        self.soft_masks.protect_parameters(self.run.layout, importance, softmask)

    def state(self, importance: ShardedImportance) -> ComponentState:
        """Each rank its shards' part."""
        return ComponentState(sharded={IMPORTANCE: importance.flats})

    def load_state(self, saved: SavedComponentState) -> ShardedImportance:
        """However it was divided."""
        engine = self.run.engine
        importance = ShardedImportance(engine.named_shards, self.run.layout.sizes, engine.ranks.info.device)
        for flat, values in saved.sharded(IMPORTANCE).items():
            importance.flats[flat].copy_(values)
        return importance

    def write(self, path: Path, importance: ShardedImportance, tokens: Sequence[str]) -> None:
        """Gather parameter by parameter in rank 0's host memory (1 byte per weight) and save there."""
        ranks, layout = self.run.engine.ranks, self.run.layout
        tensors = {name: values.cpu() for name, values in importance.whole() if ranks.info.is_main}
        ranks.run_on_main(lambda: save_parameter_importance(path, tensors, layout, tokens))

    def read(self, path: Path) -> ShardedImportance:
        """Read this rank's stretches, however many ranks wrote; tokens that came later have importance 0."""
        engine, sizes = self.run.engine, self.run.layout.sizes
        importance = ShardedImportance(engine.named_shards, sizes, engine.ranks.info.device)
        with load_parameter_importance(path, self.run.layout, self.run.tokens) as stretch:
            importance.fill(stretch)
        return importance


def sum_over_gradients(
    run: RunContext, steps: ResumableLoop[list[Batch]], loss: ImportanceLoss, kind: ImportanceScore
) -> Flats:
    """sum_b s(g_b, theta), g_b = (1/G) sum_{n in b} dL(x_n) / dtheta, over batches b of all ranks.

    s is `importance_score`.

    For `abs_grad` that is N/G times the mean absolute gradient.

    DeepSpeed accumulates, averages and shards these gradients as in training, at any stage; weights, moments and
    schedule stay as they are.

    Args:
        run: the engine.
        steps: this rank's micro-batches of each batch b.
        loss: what is differentiated.
        kind: what is summed.

    Returns:
        Flat tensor of this rank's optimizer -> (F,) float32.

    Raises:
        TrainingError: a gradient that is not finite.
    """
    engine, device = run.engine, run.engine.ranks.info.device
    steps.sums.setdefault(TOTALS, torch.zeros(2, dtype=torch.float64, device=device))
    with loss.mode(run), engine.accumulate_importance(kind) as sums:
        for number, (flat, total) in enumerate(sums.items()):
            if (earlier := steps.sums.get(f"{number}")) is not None:
                total.copy_(earlier)
            steps.sums[f"{number}"] = sums[flat]
        for step in steps:
            with engine.accumulating(len(step)):
                # A batch that overflows in fp16 adds nothing until it is measured at a lower loss scale.
                for _ in engine.attempts():
                    totals = _measure_step(run, step, loss)
            steps.sums[TOTALS] = steps.sums[TOTALS] + totals
    signal = is_above_noise_floor(steps.sums[TOTALS].clone())
    # In place, also where the pass was complete and this is done again: the factor is 0 or 1.
    return {flat: total.mul_(signal.to(total.device)) for flat, total in sums.items()}


def _measure_step(run: RunContext, step: list[Batch], loss: ImportanceLoss) -> torch.Tensor:
    """One attempt at the gradient of a batch; (2,) its number of sequences and the sum of their losses on this rank."""
    engine, device = run.engine, run.engine.ranks.info.device
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in step:
        batch = batch.to(device)
        with loss.views(run, batch):
            per_sequence = loss.of_sequences(engine, batch)
            engine.backward((per_sequence * batch.row_weights).sum() / len(batch.row_weights))
        engine.step()
        totals += count_and_sum(batch, per_sequence)
    return totals
