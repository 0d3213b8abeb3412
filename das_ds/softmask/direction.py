"""Direction importance: how much earlier domains use each direction of the inputs of a linear layer.

Shape legend: d width of the input of a linear layer, o of its output.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from das_ds.context import DomainContext, RunContext
from das_ds.distributed.state import ComponentState, SavedComponentState
from das_ds.engine.mask import UpdateMasks
from das_ds.functional.directions import direction_projector
from das_ds.functional.projectors import DenseProjector
from das_ds.softmask.apply import direction_update_masks
from das_ds.softmask.importance_file import load_directions, save_directions
from das_ds.softmask.input_covariance import input_second_moments, linear_layers
from das_ds.softmask.mask_layout import stepped_inputs
from das_ds.softmask.masked_matrix import MaskedMatrix


class DirectionImportance:
    """M of every linear layer: the sum over domains of the normalized second moments of its input.

    See `softmask.importance.Importance`, of which only `measure` differs: a forward pass needs no loss.

    Args:
        run: the engine and its network.
        moments: name of the weight -> M, (d, d) float32 in host memory, equal on every rank.
        num_tokens: of the vocabulary that the moments were measured with; None: the vocabulary does not grow.
    """

    def __init__(self, run: RunContext, moments: dict[str, torch.Tensor], num_tokens: int | None) -> None:
        self.run = run
        self.moments = moments
        self.num_tokens = num_tokens

    @classmethod
    def measure(cls, run: RunContext, domain: DomainContext, label: str) -> DirectionImportance:
        """Of one domain, by a forward pass over its sample."""
        return cls(run, input_second_moments(run, domain.sample_batches(label)), domain.num_tokens)

    def accumulate(self, earlier: DirectionImportance | None) -> DirectionImportance:
        """The sum, in new tensors: a checkpoint that is being written may still read the earlier ones."""
        moments = {} if earlier is None else earlier.moments
        total = {name: moment + moments.get(name, 0.0) for name, moment in self.moments.items()}
        return DirectionImportance(self.run, total, self.num_tokens)

    def masks(self, half_saturation: float) -> UpdateMasks:
        """dW <- dW P with P = (I + M / c)^-1, c being the half_saturation.

        Rows of tokens that were added since are not masked: no earlier text has them.
        """
        engine = self.run.engine
        sizes = self.run.layout.sizes_with(self.num_tokens)
        inputs = self._shared_inputs()
        matrices = [
            MaskedMatrix(name, name, 0, sizes[name] // layer.in_features, layer.in_features, inputs[name])
            for name, layer in linear_layers(self.run).items()
        ]
        projectors = {
            name: DenseProjector(direction_projector(self.moments[name].to(engine.ranks.info.device), half_saturation))
            for name in stepped_inputs(engine.weights.shards, matrices)
        }
        return direction_update_masks(engine, matrices, projectors)

    def _shared_inputs(self) -> dict[str, str]:
        """Weight -> the first of the weights with the same moment (queries, keys and values; gate and up)."""
        first: dict[bytes, str] = {}
        return {
            name: first.setdefault(hashlib.sha256(moment.numpy().tobytes()).digest(), name)
            for name, moment in self.moments.items()
        }

    def unit_gates(self) -> None:
        """None: directions belong to no unit."""
        return

    def state_dict(self) -> ComponentState:
        """Equal on every rank."""
        return ComponentState(replicated=self.moments, metadata={"num_tokens": self.num_tokens})

    @classmethod
    def load_state_dict(cls, run: RunContext, saved: SavedComponentState) -> DirectionImportance:
        """In host memory, where nothing but the next domain's mask needs it."""
        return cls(run, saved.replicated(), saved.metadata["num_tokens"])

    def save(self, path: Path, tokens: Sequence[str]) -> None:
        """Rank 0 writes; all ranks have equal values."""
        ranks = self.run.engine.ranks
        ranks.run_on_main(lambda: save_directions(path, self.moments, self.run.layout, tokens))

    @classmethod
    def load(cls, run: RunContext, path: Path) -> DirectionImportance:
        """In host memory."""
        widths = {name: layer.in_features for name, layer in linear_layers(run).items()}
        return cls(run, *load_directions(path, widths, run.layout, run.tokens))
