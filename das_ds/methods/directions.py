"""DAS whose soft mask lies on directions instead of units or weights (`importance.granularity: direction`)."""

from __future__ import annotations

from pathlib import Path

import torch

from das_ds.distributed.state import RankState, SavedState
from das_ds.functional.directions import direction_mask
from das_ds.methods.base import DomainContext, Method
from das_ds.methods.context import RunContext
from das_ds.methods.importance_file import DIRECTIONS_FILE, load_directions, save_directions
from das_ds.methods.input_moments import linear_layers, relative_moments


class DirectionMasked(Method):
    """Lets a linear layer W (o, d) learn least along the directions of its input that earlier domains use most:

        dW <- dW P        P = (I + M / c)^-1        M = sum over earlier domains k of A_k / (tr(A_k) / d)

    A_k = E[x x^T] (d, d) is the second moment of the layer's input over `importance.samples` sequences of domain k, by
    the model that has just learned it; c is `importance.saturation`. For an input x of earlier text, dW P x is small,
    whatever dW is: the layer goes on answering as it did. Directions that only new text uses learn freely. dW is the
    optimizer's whole step, since a mask on the gradient would be undone by Adam.

    In the eigenvectors of M that is DAS's mask 1 - I of an importance I = a / (a + c). P is the projector of orthogonal
    weight modification (Zeng et al., Nature Machine Intelligence 2019) with a larger constant; gradient projection
    memory (Saha et al., ICLR 2021) is its form with a threshold. Both modify the gradient.

    What is not the weight of a linear layer (biases, normalisation, embeddings that are not tied to the LM head) is not
    masked. Knowledge from before the first domain is known only from `importance.initial`; there is no contrast, which
    needs units.

    Keeps two fp32 matrices (d, d) per linear layer on every rank, P where the optimizer is and M in host memory, and,
    while a flat tensor is stepped, a copy of it.
    Extra compute: d / (3 * tokens of the global batch) of a step's, and a forward pass over the sample per domain.

    Raises:
        ModelError: the network has layers whose directions cannot be masked.
    """

    def __init__(self, run: RunContext) -> None:
        super().__init__(run)
        self._moments: dict[str, torch.Tensor] = {}
        self._widths = {name: layer.in_features for name, layer in linear_layers(run).items()}

    def before_domain(self, domain: DomainContext) -> None:
        """What earlier runs protect, before the first domain."""
        initial = self.run.config.method.importance.initial
        if initial is not None and not self._moments:
            self._moments = load_directions(Path(initial), self._widths, self.run.layout)

    def start_training(self, domain: DomainContext) -> None:
        """Protect what was learned so far."""
        if self._moments:
            saturation, device = self.run.config.method.importance.saturation, self.run.engine.ranks.info.device
            masks = {name: direction_mask(moment.to(device), saturation) for name, moment in self._moments.items()}
            self.run.engine.soft_masks.protect_directions(masks)

    def after_domain(self, domain: DomainContext) -> None:
        """Add what the domain's text brings into every layer."""
        batches = domain.sample_batches(f"inputs of {domain.name}")
        latest = relative_moments(self.run, batches)
        # New tensors: a checkpoint that is being written may still read the old ones.
        self._moments = {name: moment + self._moments.get(name, 0.0) for name, moment in latest.items()}
        if self.run.engine.ranks.info.is_main:
            save_directions(domain.folder / DIRECTIONS_FILE, latest, self.run.layout)
            save_directions(domain.run_folder / DIRECTIONS_FILE, self._moments, self.run.layout)

    def state(self) -> RankState:
        """Sum of the moments, equal on every rank."""
        return RankState(shared=self._moments)

    def load_state(self, saved: SavedState) -> None:
        """In host memory, where nothing but the next domain's mask needs it."""
        self._moments = saved.shared()
