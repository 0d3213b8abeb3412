"""Parameter importance (SPG: Konishi et al., Parameter-Level Soft-Masking for Continual Learning, ICML 2023).

Shape legend: B sequences of a micro-batch, G of a batch that gives one gradient, N of the sample; F elements of a flat
tensor of the optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from das_ds.config import ImportanceConfig, ImportanceScore, SoftmaskConfig
from das_ds.context import DomainContext, RunContext
from das_ds.data.batch import Batch
from das_ds.distributed.resumable import ResumableLoop
from das_ds.distributed.state import ComponentState, Flats, SavedComponentState
from das_ds.engine.mask import ElementwiseMasks
from das_ds.functional.units import UnitValues
from das_ds.models.size import FP32, MemoryUse, ModelSize, Sharding
from das_ds.softmask.apply import parameter_masks
from das_ds.softmask.importance_file import load_parameter_importance, save_parameter_importance
from das_ds.softmask.measure import TOTALS, ImportanceLoss, count_and_sum, is_above_noise_floor
from das_ds.softmask.sharded_importance import ShardedImportance

IMPORTANCE = "importance"


class ParameterImportance:
    """One byte per weight, sharded like the optimizer; every parameter counts, whether a unit owns it or not.

    See `softmask.importance.Importance`.

    Args:
        run: the engine and its units.
        sharded: importance of every weight.
    """

    def __init__(self, run: RunContext, sharded: ShardedImportance) -> None:
        self.run = run
        self.sharded = sharded

    @classmethod
    def measure(
        cls, run: RunContext, domain: DomainContext, label: str, loss: ImportanceLoss, settings: ImportanceConfig
    ) -> ParameterImportance:
        """Sum over the gradients of the sample's batches, normalized."""
        sums = sum_over_gradients(run, domain.sample_steps(label), loss, settings.score)
        sharded = ShardedImportance.from_magnitudes(
            run.engine.weights.named_shards,
            run.layout.sizes_with(run.network.num_rows),
            run.engine.ranks.info.device,
            sums,
            run.layout.owners,
            settings,
        )
        return cls(run, sharded)

    @classmethod
    def memory(cls, size: ModelSize, sharding: Sharding, *, has_own_mask: bool) -> MemoryUse:
        """1 byte a trained parameter, sharded like the optimizer; a separate mask takes another."""
        sums = FP32 * size.trained
        mask = size.trained if has_own_mask else 0
        return MemoryUse(
            optimizer={"importance": (2 * size.trained + sums + mask) // sharding.optimizer_shards},
            checkpoint=size.trained + sums,
            domain=size.trained,
            # Importance of general knowledge, and the accumulated one.
            run=2 * size.trained,
            measurement="gradients",
        )

    def accumulate(self, earlier: ParameterImportance | None) -> ParameterImportance:
        """EMax in the shards."""
        sharded = None if earlier is None else earlier.sharded
        return ParameterImportance(self.run, self.sharded.elementwise_maximum(sharded))

    def masks(self, settings: SoftmaskConfig) -> ElementwiseMasks:
        """Element by element."""
        return parameter_masks(self.run.engine, self.run.layout, self.sharded, settings)

    def unit_gates(self) -> UnitValues:
        """Mean over the weights that a unit owns; a collective."""
        return self.sharded.mean_by_unit(self.run.layout)

    def state_dict(self) -> ComponentState:
        """Each rank its shards."""
        return ComponentState(sharded={IMPORTANCE: self.sharded.flats})

    @classmethod
    def load_state_dict(cls, run: RunContext, saved: SavedComponentState) -> ParameterImportance:
        """However it was sharded."""
        sharded = _zeros(run)
        for flat, values in saved.sharded(IMPORTANCE).items():
            sharded.flats[flat].copy_(values)
        return cls(run, sharded)

    def save(self, path: Path, tokens: Sequence[str]) -> None:
        """Gather parameter by parameter in rank 0's host memory (1 byte per weight) and save there."""
        ranks = self.run.engine.ranks
        # Gathering is collective: every rank walks through all parameters, and rank 0 alone keeps them.
        tensors = {name: values.cpu() for name, values in self.sharded.gather() if ranks.info.is_main}
        ranks.run_on_main(lambda: save_parameter_importance(path, tensors, self.run.layout, tokens))

    @classmethod
    def load(cls, run: RunContext, path: Path) -> ParameterImportance:
        """Read this rank's shards, however many ranks wrote; tokens that were added since have importance 0."""
        sharded = _zeros(run)
        with load_parameter_importance(path, run.layout, run.tokens) as read:
            sharded.fill(read)
        return cls(run, sharded)


def _zeros(run: RunContext) -> ShardedImportance:
    return ShardedImportance(run.engine.weights.named_shards, run.layout.sizes, run.engine.ranks.info.device)


def sum_over_gradients(
    run: RunContext, steps: ResumableLoop[list[Batch]], loss: ImportanceLoss, kind: ImportanceScore
) -> Flats:
    """sum_b s(g_b, theta), g_b = (1/G) sum_{n in b} dL(x_n) / dtheta, over batches b of all ranks.

    Here s is `importance_score`; for `abs_grad` the sum is N/G times the mean absolute gradient.

    DeepSpeed accumulates, averages and shards these gradients as in training, at any stage; weights, moments and
    schedule do not change.

    Args:
        run: the engine.
        steps: this rank's micro-batches of each batch b.
        loss: the loss to differentiate.
        kind: which score is summed.

    Returns:
        Flat tensor of this rank's optimizer -> (F,) float32.

    Raises:
        TrainingError: a gradient that is not finite.
    """
    engine = run.engine
    # (2,): number of sequences and the sum of their losses.
    steps.accumulators.setdefault(TOTALS, torch.zeros(2, dtype=torch.float64, device=engine.ranks.info.device))
    with loss.mode(run), engine.accumulate_importance(kind) as sums:
        # The loop's sums are those of a checkpoint when a run resumes within the pass.
        for number, total in enumerate(sums.values()):
            if (saved := steps.accumulators.get(f"{number}")) is not None:
                total.copy_(saved)
            steps.accumulators[f"{number}"] = total
        for step in steps:
            with engine.gradient_accumulation(len(step)):
                # A batch that overflows in fp16 adds nothing until it is measured at a lower loss scale.
                for _ in engine.retry_on_overflow():
                    totals = _measure_step(run, step, loss)
            steps.accumulators[TOTALS] = steps.accumulators[TOTALS] + totals
    signal = is_above_noise_floor(steps.accumulators[TOTALS].clone())
    # In place is safe also when a finished pass is repeated after a restart: the factor is 0 or 1.
    return {flat: total.mul_(signal.to(total.device)) for flat, total in sums.items()}


def _measure_step(run: RunContext, step: list[Batch], loss: ImportanceLoss) -> torch.Tensor:
    """One attempt at the gradient of a batch; (2,) its number of sequences and the sum of their losses on this rank."""
    engine = run.engine
    device = engine.ranks.info.device
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in step:
        batch = batch.to(device)
        with loss.views(run, batch):
            # (B,); rows that only fill up the batch have weight 0.
            per_sequence = loss.of_sequences(engine, batch)
            engine.backward((per_sequence * batch.row_weights).sum() / len(batch.row_weights))
        engine.step()
        totals += count_and_sum(batch, per_sequence)
    return totals
