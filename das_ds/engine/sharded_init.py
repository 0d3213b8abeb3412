"""Models whose parameters are born as ZeRO-3 shards: no rank ever holds more of the weights than one module's.

The network is built by its own constructor. As soon as a module is complete, this rank keeps its slice of every
parameter in float32 and puts a placeholder without memory in its place. Random weights are then drawn module by module,
in the order and from the generator of the plain construction, so that they are equal to the last bit; pre-trained
weights are read slice by slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import deepspeed
import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel
from transformers.initialization import guard_torch_init_functions, no_init_weights

from das_ds.config.deepspeed import zero_stage
from das_ds.distributed.process_group import ProcessGroup

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
    """What one rank holds of a flattened parameter."""

    offset: int
    values: torch.Tensor
    """(n,) float32 in host memory."""


def sharded_init(deepspeed_config: dict[str, Any], ranks: ProcessGroup) -> ShardedInit | None:
    """How models are built at ZeRO-3; None at other stages, and where a rank needs more than its own slice."""
    zero = deepspeed_config.get("zero_optimization", {})
    if zero_stage(deepspeed_config) < 3 or zero.get("zero_hpz_partition_size", 1) > 1:
        return None
    return ShardedInit(deepspeed_config, ranks)


class ShardedInit:
    """Builds models for one engine; every method is called on all ranks.

    Args:
        deepspeed_config: merged DeepSpeed settings, see `config/deepspeed.py`.
        ranks: the process group.
    """

    def __init__(self, deepspeed_config: dict[str, Any], ranks: ProcessGroup) -> None:
        self._deepspeed_config = deepspeed_config
        self._ranks = ranks
        self.slices: dict[str, Slice] = {}
        """Parameter name -> this rank's exact values where DeepSpeed has rounded ones; taken by the engine."""

    def random(self, construct: Construct) -> PreTrainedModel:
        """The model of `construct()`, its random weights included."""
        placeholders = _MetaParameters(self._ranks)
        return self._finish(placeholders.build(construct), placeholders)

    def pretrained(self, construct: Construct, weights: Stored) -> PreTrainedModel:
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

    def _finish(self, model: PreTrainedModel, placeholders: _MetaParameters) -> PreTrainedModel:
        """Exchange all placeholders for ZeRO-3 parameters that hold this rank's slice."""
        # Given a module, even one without parameters, DeepSpeed installs its linear map, as it otherwise does later.
        zero = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=self._deepspeed_config)
        made: dict[nn.Parameter, Any] = {}
        for name, placeholder in model.named_parameters():
            piece = placeholders.take(placeholder)
            whole = torch.empty(placeholder.shape, dtype=zero.dtype, device=zero.local_device)
            # DeepSpeed takes this stretch and frees the rest, which nothing has touched.
            whole.view(-1)[piece.offset : piece.offset + piece.values.numel()] = piece.values
            made[placeholder] = nn.Parameter(whole, requires_grad=placeholder.requires_grad)
            zero._convert_to_deepspeed_param(made[placeholder])
            made[placeholder].partition()
            if zero.dtype != torch.float32:
                self.slices[name] = piece
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = made[parameter]
        return model


class _MetaParameters:
    """Parameters of a model under construction, on the meta device, with this rank's slices beside them."""

    def __init__(self, ranks: ProcessGroup) -> None:
        self._ranks = ranks
        # Weak: a placeholder that gives way to one it is tied to takes its slice with it.
        self._slices: Any = WeakIdKeyDictionary()
        # A weight that two modules share is met once in each.
        self._placeholder_of: Any = WeakIdKeyDictionary()

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

    def take(self, placeholder: nn.Parameter) -> Slice:
        """The slice, no longer kept here."""
        piece: Slice = self._slices.pop(placeholder)
        return piece

    def _own(self, numel: int) -> tuple[int, int]:
        """ZeRO-3's partition: equal parts in rank order, the last ones cut short: (offset, number of elements)."""
        info = self._ranks.info
        part = -(-numel // info.world_size)
        offset = min(part * info.rank, numel)
        return offset, min(part, numel - offset)

    def _replace(self, complete: nn.Module, *, keep_values: bool) -> None:
        for module in complete.modules():
            for name, parameter in module._parameters.items():
                if parameter is None or parameter.is_meta:
                    continue
                if parameter not in self._placeholder_of:
                    meta = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
                    self._placeholder_of[parameter] = meta
                    if keep_values:
                        self._keep(meta, parameter)
                module._parameters[name] = self._placeholder_of[parameter]

    def _keep(self, placeholder: nn.Parameter, values: torch.Tensor) -> None:
        offset, numel = self._own(values.numel())
        own = values.detach().reshape(-1)[offset : offset + numel]
        if placeholder in self._slices:
            # In place: small pieces allocated between large ones that come and go would leave holes in the heap.
            self._slices[placeholder].values.copy_(own)
        else:
            self._slices[placeholder] = Slice(offset, own.to(torch.float32, copy=True))

    def _initialize(self, model: PreTrainedModel) -> None:
        """`PreTrainedModel.initialize_weights`, every module's parameters whole only while they are drawn.

        A module may draw for its children too, but not for theirs: Hugging Face's own ZeRO-3 construction rests on it.
        """
        self._replace(model, keep_values=True)
        with torch.no_grad(), guard_torch_init_functions():
            self._draw(model, model._initialize_weights)

    def _draw(self, module: nn.Module, initialize: Callable[..., None]) -> None:
        for child in module.children():
            self._draw(child, child._initialize_weights if isinstance(child, PreTrainedModel) else initialize)
        children = [child for child in module.children() if not isinstance(child, PreTrainedModel)]
        with self._whole([module, *children]):
            initialize(module, False)

    @contextmanager
    def _whole(self, modules: list[nn.Module]) -> Iterator[None]:
        places = [(module, name, p) for module in modules for name, p in module._parameters.items() if p is not None]
        whole = {placeholder: self._gathered(placeholder) for _, _, placeholder in places}
        for module, name, placeholder in places:
            module._parameters[name] = whole[placeholder]
        yield
        for module, name, placeholder in places:
            module._parameters[name] = placeholder
        for placeholder, values in whole.items():
            self._keep(placeholder, values)

    def _gathered(self, placeholder: nn.Parameter) -> nn.Parameter:
        part = -(-placeholder.numel() // self._ranks.info.world_size)
        parts = self._ranks.all_gather_cpu(self._slices[placeholder].values, part)
        values = parts[: placeholder.numel()].view(placeholder.shape)
        return nn.Parameter(values, requires_grad=placeholder.requires_grad)
