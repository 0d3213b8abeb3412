"""Sharded initialization: models are built as ZeRO-3 shards, and no rank ever holds more than one module's weights.

The network is built by its own constructor. As soon as a module is complete, this rank keeps its slice of every
parameter in float32 and puts a placeholder without memory in its place. Random weights are then drawn module by module,
in the order and from the generator of the plain construction, so that they are equal to the last bit; pre-trained
weights are read slice by slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel
from transformers.initialization import guard_torch_init_functions, no_init_weights

from das_ds.config.deepspeed import EngineConfig
from das_ds.distributed.process_group import ProcessGroup
from das_ds.engine.zero import Zero3Init

Construct = Callable[[], PreTrainedModel]


class Stored(Protocol):
    """Pre-trained weights in files, such as `models.weights.StoredWeights`."""

    missing: list[str]
    """Parameters that no file has."""

    def __contains__(self, name: str) -> bool:
        """Whether there are values of a parameter or buffer."""

    def read(self, name: str, shape: torch.Size, offset: int, numel: int) -> torch.Tensor:
        """Elements [offset, offset + numel) of a flattened one, (numel,) float32 with memory of its own."""


@dataclass(frozen=True)
class Slice:
    """One rank's part of a flattened parameter."""

    offset: int
    values: torch.Tensor
    """(n,) float32 in host memory."""


def sharded_init(config: EngineConfig, ranks: ProcessGroup) -> ShardedInit | None:
    """What builds models at ZeRO-3; None at other stages, and where a rank needs more than its own slice."""
    if config.zero_stage < 3 or config.has_secondary_shards:
        return None
    return ShardedInit(config, ranks)


class ExactWeights:
    """This rank's exact values of parameters that DeepSpeed rounds to 16 bits, each given away once.

    Args:
        slices: parameter name -> this rank's slice of it.
    """

    def __init__(self, slices: dict[str, Slice] | None = None) -> None:
        self._slices = {} if slices is None else slices

    def __contains__(self, name: str) -> bool:
        """Whether there are values of this parameter."""
        return name in self._slices

    def take(self, names: Iterable[str]) -> dict[str, Slice]:
        """Name -> values of those of the parameters that have some; they are no longer held here."""
        return {name: self._slices.pop(name) for name in list(names) if name in self._slices}

    def rename(self, old_names: dict[str, str]) -> ExactWeights:
        """All values by new names (new name -> old name); none are held here afterwards."""
        renamed = {new: self._slices.pop(old) for new, old in old_names.items() if old in self._slices}
        self._slices = {}
        return ExactWeights(renamed)


class ShardedInit:
    """Builds models for one engine; every method is called on all ranks.

    Args:
        config: of the engine, at ZeRO stage 3.
        ranks: the process group.
    """

    def __init__(self, config: EngineConfig, ranks: ProcessGroup) -> None:
        self._config = config
        self._ranks = ranks
        self._slices: dict[str, Slice] = {}

    def from_config(self, construct: Construct) -> PreTrainedModel:
        """The model of `construct()`, its random weights included."""
        placeholders = _MetaParameters(self._ranks)
        return self._finish(placeholders.build(construct), placeholders)

    def from_pretrained(self, construct: Construct, weights: Stored) -> PreTrainedModel:
        """The model of `construct()` with stored weights; those that are missing stay as it drew them.

        Raises:
            SafetensorError, OSError: damaged files.
        """
        placeholders = _MetaParameters(self._ranks)
        if weights.missing:
            model = placeholders.build(construct)
        else:
            with no_init_weights():
                model = placeholders.build(construct, keep_values=False)
        model.tie_weights()
        for name, parameter in model.named_parameters():
            if name in weights:
                placeholders.fill(parameter, partial(weights.read, name))
        for name, buffer in model.named_buffers():
            if name in weights:
                buffer.copy_(weights.read(name, buffer.shape, 0, buffer.numel()).view(buffer.shape))
        return self._finish(model, placeholders)

    def take_exact_weights(self) -> ExactWeights:
        """This rank's exact values where DeepSpeed has rounded ones; no longer held here."""
        exact = ExactWeights(self._slices)
        self._slices = {}
        return exact

    def _finish(self, model: PreTrainedModel, placeholders: _MetaParameters) -> PreTrainedModel:
        """Replace all placeholders by ZeRO-3 parameters that hold this rank's slice."""
        zero = Zero3Init(self._config.raw)
        parameters: dict[nn.Parameter, nn.Parameter] = {}
        for name, placeholder in model.named_parameters():
            own = placeholders.pop(placeholder)
            values = torch.empty(placeholder.shape, dtype=zero.dtype, device=zero.device)
            # DeepSpeed keeps this slice and frees the rest, which was never written: no memory was touched for it.
            values.view(-1)[own.offset : own.offset + own.values.numel()] = own.values
            parameters[placeholder] = nn.Parameter(values, requires_grad=placeholder.requires_grad)
            zero.partition(parameters[placeholder])
            if zero.dtype != torch.float32:
                self._slices[name] = own
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = parameters[parameter]
        return model


class _MetaParameters:
    """Parameters of a model under construction, on the meta device, and this rank's slices of their values."""

    def __init__(self, ranks: ProcessGroup) -> None:
        self._ranks = ranks
        # Weak: when a placeholder is replaced by one it is tied to, its slice is freed with it.
        self._slices: Any = WeakIdKeyDictionary()
        # A weight that two modules share occurs in both.
        self._placeholders: Any = WeakIdKeyDictionary()

    def build(self, construct: Construct, *, keep_values: bool = True) -> PreTrainedModel:
        """The model of `construct()` with placeholders for parameters; buffers are real."""

        def replace(_: nn.Module, __: str, complete: nn.Module | None) -> None:
            if complete is not None:
                self._replace(complete, keep_values=keep_values)

        hook = register_module_module_registration_hook(replace)
        initialize = PreTrainedModel.initialize_weights
        PreTrainedModel.initialize_weights = lambda model: self._initialize(model)  # type: ignore[method-assign]
        try:
            model = construct()
        finally:
            PreTrainedModel.initialize_weights = initialize  # type: ignore[method-assign]
            hook.remove()
        self._replace(model, keep_values=keep_values)
        return model

    def fill(self, placeholder: nn.Parameter, read: Callable[[torch.Size, int, int], torch.Tensor]) -> None:
        """Set a slice from `read(shape, offset, numel) -> (numel,) float32`."""
        offset, numel = self._own(placeholder.numel())
        self._slices[placeholder] = Slice(offset, read(placeholder.shape, offset, numel))

    def pop(self, placeholder: nn.Parameter) -> Slice:
        """The slice, no longer held here."""
        own: Slice = self._slices.pop(placeholder)
        return own

    def _own(self, numel: int) -> tuple[int, int]:
        """(offset, number of elements) of this rank's slice: equal slices in rank order, the last ones shorter."""
        info = self._ranks.info
        slice_numel = -(-numel // info.world_size)
        offset = min(slice_numel * info.rank, numel)
        return offset, min(slice_numel, numel - offset)

    def _replace(self, complete: nn.Module, *, keep_values: bool) -> None:
        for module in complete.modules():
            for name, parameter in module._parameters.items():
                if parameter is None or parameter.is_meta:
                    continue
                if parameter not in self._placeholders:
                    meta = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
                    self._placeholders[parameter] = meta
                    if keep_values:
                        self._keep(meta, parameter)
                module._parameters[name] = self._placeholders[parameter]

    def _keep(self, placeholder: nn.Parameter, values: torch.Tensor) -> None:
        offset, numel = self._own(values.numel())
        own = values.detach().reshape(-1)[offset : offset + numel]
        if placeholder in self._slices:
            # In place: small tensors allocated between large ones that come and go would fragment the heap.
            self._slices[placeholder].values.copy_(own)
        else:
            self._slices[placeholder] = Slice(offset, own.to(torch.float32, copy=True))

    def _initialize(self, model: PreTrainedModel) -> None:
        """`PreTrainedModel.initialize_weights` with one module's parameters gathered at a time, while they are drawn.

        A module may draw for its children too, but not for theirs: Hugging Face's own ZeRO-3 construction relies on it.
        """
        self._replace(model, keep_values=True)
        with torch.no_grad(), guard_torch_init_functions():
            self._draw(model, model._initialize_weights)

    def _draw(self, module: nn.Module, initialize: Callable[..., None]) -> None:
        for child in module.children():
            self._draw(child, child._initialize_weights if isinstance(child, PreTrainedModel) else initialize)
        children = [child for child in module.children() if not isinstance(child, PreTrainedModel)]
        with self._gather([module, *children]):
            initialize(module, False)

    @contextmanager
    def _gather(self, modules: list[nn.Module]) -> Iterator[None]:
        """Inside, the modules have complete parameters; afterwards this rank keeps its slices of their new values."""
        owners = [(module, name, p) for module in modules for name, p in module._parameters.items() if p is not None]
        complete = {placeholder: self._all_gather(placeholder) for _, _, placeholder in owners}
        for module, name, placeholder in owners:
            module._parameters[name] = complete[placeholder]
        yield
        for module, name, placeholder in owners:
            module._parameters[name] = placeholder
        for placeholder, values in complete.items():
            self._keep(placeholder, values)

    def _all_gather(self, placeholder: nn.Parameter) -> nn.Parameter:
        slice_numel = -(-placeholder.numel() // self._ranks.info.world_size)
        slices = self._ranks.all_gather_cpu(self._slices[placeholder].values, slice_numel)
        # The last slices are padded after the last element.
        values = slices[: placeholder.numel()].view(placeholder.shape)
        return nn.Parameter(values, requires_grad=placeholder.requires_grad)
