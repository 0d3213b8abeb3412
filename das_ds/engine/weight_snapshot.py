"""Weights of an earlier time, run through the same module in place of the present ones (DeepSpeed 0.19.8).

A second module under a second engine would double hooks, buffers and the work of building it. Here only the tensors
that a forward pass reads exist twice, in its type and divided as they are: whole at ZeRO 0 to 2, this rank's part at
ZeRO 3, which gathers earlier parts exactly as it gathers present ones.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from das_ds.distributed.state import Flats, Shard
from das_ds.engine.zero import refresh_weights


@dataclass(frozen=True)
class _Stored:
    """What was copied of one parameter."""

    values: torch.Tensor
    offset: int
    """First element of the flattened parameter that is among the values."""


class WeightSnapshot:
    """A copy of the weights as they are now.

    Args:
        engine: whose module runs with them.
        parameters: name -> parameter that may change; others need no copy.
        shards: this rank's shards of them.
    """

    def __init__(
        self, engine: DeepSpeedEngine, parameters: dict[str, torch.nn.Parameter], shards: Sequence[Shard]
    ) -> None:
        self._shards = shards
        # Under ZeRO-3 this also gathers the small parameters that stay whole.
        refresh_weights(engine)
        optimizer, owners = engine.optimizer, list(parameters.values())
        self._gathering = (
            _Zero3Swap(optimizer, owners) if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3) else None
        )
        readable, offsets = (owners, [0] * len(owners)) if self._gathering is None else self._gathering.parts()
        copies = [tensor.detach().clone() for tensor in readable]
        self._stored = {
            name: _Stored(values, offset) for name, values, offset in zip(parameters, copies, offsets, strict=True)
        }
        whole = [] if self._gathering is None else self._gathering.persistent
        self._places = [*readable, *whole]
        self._copies = [*copies, *(parameter.detach().clone() for parameter in whole)]

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the module computes with these weights; for whole passes without gradients.

        Pointers change hands, nothing is copied. The present weights must be what the module holds on entry, and no
        graph of the present weights may be open that is still to be walked.
        """
        present = [place.data for place in self._places]
        if self._gathering is not None:
            self._gathering.begin()
        _point(self._places, self._copies)
        try:
            yield
        finally:
            _point(self._places, present)
            if self._gathering is not None:
                self._gathering.end()

    def flats(self) -> Flats:
        """These weights by the flat tensors of the optimizer, in their own type, for a checkpoint."""
        result: Flats = {}
        for shard in self._shards:
            stored = self._stored[shard.name]
            first = shard.offset - stored.offset
            if shard.flat not in result:
                result[shard.flat] = stored.values.new_zeros(shard.flat.numel())
            result[shard.flat][shard.start : shard.start + shard.numel] = stored.values.view(-1)[
                first : first + shard.numel
            ]
        return result


class _Zero3Swap:
    """How ZeRO-3 gathers weights other than the present ones.

    DeepSpeed records the order in which a pass uses modules, and gathers ahead in later passes of that order. A pass
    forward alone between two of training would break their record, and its own, every time: it gets a coordinator of
    its own. Parameters below `stage3_param_persistence_threshold` stay whole and are exchanged whole.
    """

    def __init__(self, optimizer: Any, parameters: list[torch.nn.Parameter]) -> None:
        self._offload = optimizer.parameter_offload
        self._parameters: list[Any] = list(parameters)
        self.persistent: list[Any] = [parameter for parameter in self._parameters if parameter.ds_persist]
        self._statuses: list[Any] = []
        # With a record of its own, also where there is none to forget yet.
        self._coordinator = copy.copy(self._offload.param_coordinator)
        if self._coordinator.is_invalid_trace():
            self._coordinator._clear_trace_structures()
        else:
            self._coordinator._invalidate_trace()

    def parts(self) -> tuple[list[torch.Tensor], list[int]]:
        """This rank's part of every parameter, and where it begins."""
        parts = [parameter.ds_tensor for parameter in self._parameters]
        ranks = [parameter.ds_zero_partition_rank for parameter in self._parameters]
        return parts, [rank * part.ds_numel for rank, part in zip(ranks, parts, strict=True)]

    def begin(self) -> None:
        """To be called before the weights change hands."""
        self._release()
        # After a step that overflowed even these are divided until the next pass.
        self._statuses = [parameter.ds_status for parameter in self.persistent]
        for parameter in self.persistent:
            parameter.ds_status = ZeroParamStatus.AVAILABLE
        self._exchange()

    def end(self) -> None:
        """To be called after they changed back."""
        self._exchange()
        for parameter, status in zip(self.persistent, self._statuses, strict=True):
            parameter.ds_status = status
        self._release()

    def _exchange(self) -> None:
        self._offload.param_coordinator, self._coordinator = self._coordinator, self._offload.param_coordinator

    def _release(self) -> None:
        """What a pass left gathered would be taken for the weights of the next."""
        for parameter in self._parameters:
            if parameter.ds_status == ZeroParamStatus.AVAILABLE and not parameter.ds_persist:
                parameter.partition()


def _point(places: list[Any], values: list[torch.Tensor]) -> None:
    for place, value in zip(places, values, strict=True):
        place.data = value
