"""Protection by importance of single weights.

Shape legend: N weights of a parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from das_ds.errors import TrainingError
from das_ds.integrations.network import Network
from das_ds.integrations.protection import BuiltMasks, Protection, Tensors
from das_ds.integrations.settings import ElementwiseSettings
from das_ds.integrations.steps import HookedSteps
from das_ds.softmask.apply import apply_masks, clear_masks, parameter_masks
from das_ds.softmask.importance_file import load_parameter_importance, save_parameter_importance
from das_ds.softmask.measure import all_finite, is_above_noise_floor
from das_ds.softmask.sharded_importance import ShardedImportance


class ParameterProtection(Protection):
    """Importance of every weight, see `softmask.parameter`."""

    def __init__(
        self, network: Network, steps: HookedSteps, tokens: Sequence[str], settings: ElementwiseSettings
    ) -> None:
        super().__init__(network, steps, tokens)
        self._settings = settings
        self._sharded: ShardedImportance | None = None

    @property
    def is_empty(self) -> bool:
        """See `Protection`."""
        return self._sharded is None

    def clear(self) -> None:
        """See `Protection`."""
        self._sharded = None

    def measure(self, dataloader: Iterable[Any]) -> None:
        """EMax with normalized sums of the scores of gradients, one for the batches of all ranks together.

        Raises:
            TrainingError: a loss or a gradient that is not finite, on any rank.
        """
        network = self.network
        importance = self._settings.importance
        totals = torch.zeros(2, dtype=torch.float64, device=network.device)
        measuring = self.steps.accumulate_importance(importance.score)
        with network.evaluating(), measuring as (sums, backward):
            for batch, counts in network.batches(dataloader):
                loss = network.loss(batch, self.steps.runner)
                backward(loss * float(counts))
                # Losses of other kinds, such as densities, may be negative.
                totals += counts * torch.stack((torch.ones_like(loss), loss.detach().abs())).double()
            measured = {str(number): total for number, total in enumerate(sums.values())}
            is_finite = all_finite({"losses": totals, **measured})
        if not is_finite:
            raise TrainingError(
                "importance: found a loss or a gradient that is not finite, expected finite numbers; the model "
                "diverged, or a batch has values that are not finite"
            )
        signal = is_above_noise_floor(totals)
        latest = ShardedImportance.from_magnitudes(
            self.steps.weights.named_shards,
            network.layout.sizes,
            network.device,
            {flat: total * signal.to(total.device) for flat, total in sums.items()},
            network.layout.owners,
            importance,
        )
        self._sharded = latest.elementwise_maximum(self._sharded)

    def apply(self) -> None:
        """Multiply updates or gradients by 1 - I."""
        sharded = self._sharded
        if sharded is None:
            clear_masks(self.steps)
            return
        masks = BuiltMasks(lambda softmask: parameter_masks(self.steps, self.network.layout, sharded, softmask))
        apply_masks(self.steps, masks, self._settings.softmask, apply_to=self._settings.softmask.apply_to)

    def save(self, path: Path) -> None:
        """See `importance_file`."""
        tensors = self.tensors()
        ranks = self.steps.ranks
        ranks.run_on_main(lambda: save_parameter_importance(path, tensors, self.network.layout, self.tokens))

    def load(self, path: Path) -> None:
        """See `importance_file`."""
        sharded = self._zeros()
        with load_parameter_importance(path, self.network.layout, self.tokens or None) as read:
            sharded.fill(read)
        self._sharded = sharded

    def tensors(self) -> Tensors:
        """Parameter -> (N,) uint8, 255ths; a collective for each."""
        assert self._sharded is not None, "something is protected"
        return {name: values.cpu() for name, values in self._sharded.gather()}

    def load_tensors(self, tensors: Tensors, num_tokens: int | None = None) -> None:
        """Each rank keeps its shards."""
        self._check_shapes(tensors, {name: (size,) for name, size in self.network.layout.sizes.items()})
        sharded = self._zeros()
        sharded.fill(lambda name, offset, numel: tensors[name][offset : offset + numel])
        self._sharded = sharded

    def _zeros(self) -> ShardedImportance:
        return ShardedImportance(
            self.steps.weights.named_shards, self.network.layout.sizes, self.steps.ranks.info.device
        )
