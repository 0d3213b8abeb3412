"""What is protected, by method: measured on text, accumulated over domains, and turned into masks of steps.

Shape legend: d width of an input, L layers, U units, N weights of a parameter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from das_ds.distributed.collectives import broadcast_among, rank, world_size
from das_ds.errors import DataError, ImportanceError, TrainingError
from das_ds.functional.importance import elementwise_maximum, importance_score, normalize_units
from das_ds.functional.units import UnitValues
from das_ds.integrations.network import Network, weigh_tokens
from das_ds.integrations.settings import DirectionsSettings, ElementwiseSettings
from das_ds.integrations.steps import HookedSteps
from das_ds.softmask.apply import apply_masks, clear_masks, mask_directions, parameter_masks, unit_masks
from das_ds.softmask.direction_moments import DirectionMoments, read_moments
from das_ds.softmask.importance_file import (
    load_parameter_importance,
    load_unit_importance,
    save_parameter_importance,
    save_unit_importance,
)
from das_ds.softmask.input_layout import InputLayout, build_input_layout, group_inputs
from das_ds.softmask.input_moments import SUMS_BYTES, add_second_moment_, reduce_to_owners
from das_ds.softmask.layer_inputs import LayerInputs
from das_ds.softmask.linear_inputs import crop_vocabulary, record_layer_inputs, unmasked_elements
from das_ds.softmask.measure import all_finite, average_scores, gate_gradients, is_above_noise_floor
from das_ds.softmask.sharded_importance import ShardedImportance

Tensors = dict[str, torch.Tensor]


class Protection(ABC):
    """One method's measurements; all methods are called on all ranks together.

    Args:
        network: what is measured.
        steps: what is masked.
        tokens: the vocabulary by id; empty: it is not known.
    """

    def __init__(self, network: Network, steps: HookedSteps, tokens: Sequence[str]) -> None:
        self.network = network
        self.steps = steps
        self.tokens = tokens

    @property
    @abstractmethod
    def is_empty(self) -> bool:
        """Whether nothing is protected yet."""

    @property
    def num_tokens(self) -> int | None:
        """Of the vocabulary that was measured, where rows of tokens that were added since are free; None: unknown."""
        return None

    @abstractmethod
    def clear(self) -> None:
        """Protect nothing."""

    @abstractmethod
    def measure(self, dataloader: Iterable[Any]) -> None:
        """Add what the network needs for this text."""

    @abstractmethod
    def apply(self) -> None:
        """Mask all further steps by what is protected, and by nothing else."""

    @abstractmethod
    def save(self, path: Path) -> None:
        """Write a file that runs of das_ds read, too."""

    @abstractmethod
    def load(self, path: Path) -> None:
        """Protect what a file says, in place of what was measured so far."""

    @abstractmethod
    def tensors(self) -> Tensors:
        """Everything that is protected, complete and in host memory on every rank."""

    @abstractmethod
    def load_tensors(self, tensors: Tensors, num_tokens: int | None = None) -> None:
        """Protect these, in place of what was measured so far.

        Args:
            tensors: as `tensors` gave them.
            num_tokens: as the property was then.

        Raises:
            ImportanceError: they are of another model.
        """

    def _check_shapes(self, tensors: Tensors, expected: dict[str, tuple[int, ...]]) -> None:
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for name in {**expected, **found}:
            if found.get(name) != expected.get(name):
                raise ImportanceError(
                    f"state_dict: found {found.get(name, 'nothing')} for {name}, expected "
                    f"{expected.get(name, 'nothing')}; it is of another model"
                )


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
        projectors = self._moments.shared_projectors(settings.half_saturation, settings.rank)
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


class UnitProtection(Protection):
    """Importance of every head, neuron and output, see `softmask.unit`."""

    def __init__(
        self, network: Network, steps: HookedSteps, tokens: Sequence[str], settings: ElementwiseSettings
    ) -> None:
        super().__init__(network, steps, tokens)
        self._settings = settings
        self._values: UnitValues | None = None

    @property
    def is_empty(self) -> bool:
        """See `Protection`."""
        return self._values is None

    def clear(self) -> None:
        """See `Protection`."""
        self._values = None

    def measure(self, dataloader: Iterable[Any]) -> None:
        """EMax with normalized mean scores of the gates' gradients, one for each row of a batch."""
        network = self.network
        sums: UnitValues = {}
        totals = torch.zeros(2, dtype=torch.float64, device=network.device)
        with network.evaluating():
            for batch, counts in network.batches(dataloader):
                weights = torch.full((network.num_sequences(batch),), float(counts), device=network.device)
                scores, losses = gate_gradients(
                    network.gates, network.layout, weights, partial(network.sequence_losses, batch)
                )
                self.steps.release_gathered()
                for group, values in scores.items():
                    # (L, 1, U): batches may have different numbers of rows.
                    score = importance_score(values, 1.0, self._settings.importance.score).sum(dim=1, keepdim=True)
                    sums[group] = score + sums.get(group, 0.0)
                totals += torch.stack((weights, weights * losses)).sum(dim=1)
        latest = normalize_units(average_scores(sums, totals), self._settings.importance)
        self._values = elementwise_maximum(latest, self._values)

    def apply(self) -> None:
        """Multiply updates or gradients by 1 - I."""
        values = self._values
        if values is None:
            clear_masks(self.steps)
            return
        masks = _Masks(lambda softmask: unit_masks(self.steps, self.network.layout, values, softmask))
        apply_masks(self.steps, masks, self._settings.softmask, apply_to=self._settings.softmask.apply_to)

    def save(self, path: Path) -> None:
        """See `importance_file`."""
        values = self._values
        assert values is not None, "something is protected"
        self.steps.ranks.run_on_main(lambda: save_unit_importance(path, values, self.network.layout, self.tokens))

    def load(self, path: Path) -> None:
        """See `importance_file`."""
        loaded = load_unit_importance(path, self.network.layout, self.tokens or None)
        self._values = {group: values.to(self.network.device) for group, values in loaded.items()}

    def tensors(self) -> Tensors:
        """Group -> (L, U)."""
        assert self._values is not None, "something is protected"
        return {group: values.cpu().clone() for group, values in self._values.items()}

    def load_tensors(self, tensors: Tensors, num_tokens: int | None = None) -> None:
        """Equal on every rank."""
        layout = self.network.layout
        self._check_shapes(tensors, {group: (layout.num_layers, units) for group, units in layout.num_units.items()})
        self._values = {group: values.to(self.network.device).clone() for group, values in tensors.items()}


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
        masks = _Masks(lambda softmask: parameter_masks(self.steps, self.network.layout, sharded, softmask))
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


class _Masks:
    """A function in the place of an `Importance`, for `apply_masks`."""

    def __init__(self, build: Any) -> None:
        self._build = build

    def masks(self, settings: Any) -> Any:
        """Masks of the flat tensors."""
        return self._build(settings)
