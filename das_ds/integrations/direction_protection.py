"""Protection by `directions`: second moments of layer inputs.

Shape legend: d width of an input.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from das_ds.distributed.collectives import broadcast_among, rank, world_size
from das_ds.errors import DataError, ImportanceError
from das_ds.integrations.network import Network, weigh_tokens
from das_ds.integrations.protection import Protection, Tensors
from das_ds.integrations.settings import DirectionsSettings
from das_ds.integrations.steps import HookedSteps
from das_ds.softmask.apply import clear_masks, mask_directions
from das_ds.softmask.direction_moments import DirectionMoments, read_moments
from das_ds.softmask.input_layout import InputLayout, build_input_layout, group_inputs
from das_ds.softmask.input_moments import SUMS_BYTES, add_second_moment_, reduce_to_owners
from das_ds.softmask.layer_inputs import LayerInputs
from das_ds.softmask.linear_inputs import crop_vocabulary, record_layer_inputs, unmasked_elements


class DirectionProtection(Protection):
    """M of every input, see `methods.directions`."""

    def __init__(
        self, network: Network, steps: HookedSteps, tokens: Sequence[str], settings: DirectionsSettings
    ) -> None:
        super().__init__(network, steps, tokens)
        self._settings = settings
        self._found: tuple[LayerInputs, InputLayout] | None = None
        self._moments: DirectionMoments | None = None

    @property
    def is_empty(self) -> bool:
        """See `Protection`."""
        return self._moments is None

    @property
    def num_tokens(self) -> int | None:
        """See `Protection`."""
        return None if self._moments is None else self._moments.num_tokens

    def clear(self) -> None:
        """See `Protection`."""
        self._moments = None

    def _inputs(self, batch: Any = None) -> tuple[LayerInputs, InputLayout]:
        """Layers and their inputs; a collective at first."""
        if self._found is None:
            if batch is None and self.network.text_model is None:
                raise ImportanceError(
                    "load: found a model that reads no token ids, whose layers are found by a batch; expected "
                    "trace(batch) before load"
                )
            layers = self.network.layers(batch)
            self.steps.release_gathered()
            inputs = build_input_layout(layers.matrices, self.steps.weights.shards, self.steps.ranks)
            self._found = layers, inputs
        return self._found

    def trace(self, batch: Any) -> None:
        """Find the layers by a forward pass."""
        self._inputs(batch)

    def _build(self, moments: dict[str, torch.Tensor | None], num_tokens: int | None) -> DirectionMoments:
        return DirectionMoments(self.steps.ranks, self._inputs()[1], moments, num_tokens, torch.float32)

    def measure(self, dataloader: Iterable[Any]) -> None:
        """Add M = A / (tr(A) / d), A = E[x x^T], of every input x; padding does not count, and of the LM head's input
        only positions that predict.

        The data is read once for every 2 GiB of moments.

        Raises:
            DataError: no batch, or an iterator that would have to be read again.
            TrainingError: an input that is not finite.
        """
        if iter(dataloader) is dataloader:
            raise DataError(
                f"dataloader: found a {type(dataloader).__name__}, which can be read once only, expected a DataLoader "
                "or a list of batches"
            )
        if self._found is None:
            first, _ = next(self.network.batches(dataloader))
            self._inputs(first)
        layers, inputs = self._inputs()
        moments: dict[str, torch.Tensor | None] = {}
        for group in group_inputs(inputs.widths, SUMS_BYTES):
            sums = self._sum(layers, inputs, dataloader, group)
            moments |= reduce_to_owners(self.steps.ranks, inputs, sums, group)
        latest = self._build(moments, len(self.tokens) or None)
        self._moments = latest.accumulate(self._moments)

    def _sum(self, layers: LayerInputs, inputs: InputLayout, dataloader: Iterable[Any], group: list[str]) -> Tensors:
        device = self.network.device
        sums = {name: torch.zeros(inputs.widths[name], inputs.widths[name], device=device) for name in group}
        num_read = 0
        counts = True

        def add(name: str, x: torch.Tensor, weights: torch.Tensor | None, is_table: bool) -> None:
            # Tables are equal in all batches and on all ranks.
            if counts and (not is_table or (num_read == 0 and rank() == 0)):
                add_second_moment_(sums[name], x, weights)

        recording = record_layer_inputs(layers, group, add, weigh_tokens)
        with self.network.evaluating(), torch.no_grad(), recording as recorder:
            for batch, is_new in self.network.batches(dataloader):
                counts = is_new
                recorder.start(self.network.text_batch(batch))
                self.network.run(batch)
                num_read += 1
        self.steps.release_gathered()
        return sums

    def apply(self) -> None:
        """Multiply gradients, updates or both by P = (I + M / c)^-1."""
        clear_masks(self.steps)
        if self._moments is None:
            return
        settings = self._settings
        if settings.apply_to == "gradient":
            self.steps.check_gradient_masks()
        layers, _ = self._inputs()
        vocabulary = self.network.layout.vocabulary
        num_tokens = self._masked_tokens()
        matrices = crop_vocabulary(layers.matrices, vocabulary, num_tokens)
        frozen = {}
        if settings.freeze_unmasked:
            frozen = unmasked_elements(self.network.shapes, matrices, vocabulary, num_tokens)
        projectors = self._moments.shared_projectors(settings.half_saturation, settings.rank, settings.over_domains)
        mask_directions(self.steps, matrices, projectors, apply_to=settings.apply_to, frozen=frozen)

    def _masked_tokens(self) -> int | None:
        """Rows of the vocabulary that are masked; None: all, also those that no token has."""
        assert self._moments is not None, "something is protected"
        known = self._moments.num_tokens
        return known if self.tokens and known is not None and known < len(self.tokens) else None

    def save(self, path: Path) -> None:
        """See `directions_file`."""
        assert self._moments is not None, "something is protected"
        self._moments.write(path, self.network.layout, self.tokens)

    def load(self, path: Path) -> None:
        """See `directions_file`."""
        tokens = self.tokens or None
        _, inputs = self._inputs()
        moments, num_tokens = read_moments(path, self.steps.ranks, inputs, self.network.layout, tokens)
        self._moments = self._build(moments, num_tokens or None)

    def tensors(self) -> Tensors:
        """Input -> M."""
        assert self._moments is not None, "something is protected"
        _, inputs = self._inputs()
        device = self.steps.ranks.info.device
        everyone = range(world_size())
        complete = {}
        for name, width in inputs.widths.items():
            own = self._moments.moments.get(name)
            moment = torch.empty(width, width, device=device) if own is None else own.to(device)
            broadcast_among(moment, inputs.owners[name], everyone)
            complete[name] = moment.cpu()
        return complete

    def load_tensors(self, tensors: Tensors, num_tokens: int | None = None) -> None:
        """Each owner keeps its moments."""
        _, inputs = self._inputs()
        self._check_shapes(tensors, {name: (width, width) for name, width in inputs.widths.items()})
        own = set(inputs.owned_by(rank()))
        moments = {name: tensors[name].clone() if name in own else None for name in inputs.widths}
        self._moments = self._build(moments, num_tokens)
