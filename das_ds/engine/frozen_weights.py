"""Frozen weights as they were loaded: with LoRA everything but the adapters.

In 16 bits DeepSpeed rounds them. An export must neither lose bits nor read the source again, which may have changed
since and does not have weights that were drawn at random. So the values that rounding changes are kept in host memory:
sharded where the network was initialized sharded, on rank 0 elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection

import deepspeed
import torch
from torch import nn

from das_ds.distributed.process_group import ProcessGroup
from das_ds.engine.sharded_init import ExactWeights, Slice
from das_ds.engine.zero import full_shape, is_partitioned

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class FrozenWeights:
    """Made before DeepSpeed takes over the network; every method is called on all ranks.

    Args:
        parameters: name -> parameter that is not trained.
        exact: this rank's exact values where the model was initialized sharded; those of `parameters` are taken.
        precision: `train.precision`.
        ranks: the process group.
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter], exact: ExactWeights, precision: str, ranks: ProcessGroup
    ) -> None:
        self._parameters = parameters
        self._ranks = ranks
        self._slices: dict[str, Slice] = {}
        self._complete: dict[str, torch.Tensor] = {}
        self._names_on_main: set[str] = set()
        slices = exact.take(parameters)
        if precision == "fp32":
            return
        dtype = DTYPES[precision]
        rounded_here = {name for name, own in slices.items() if _changes_when_rounded(own.values, dtype)}
        # A rank whose slice survives rounding still takes part in gathering where that of another does not.
        rounded = set().union(*ranks.all_gather_object(rounded_here))
        self._slices = {name: own for name, own in slices.items() if name in rounded}
        if ranks.info.is_main:
            self._complete = {
                name: _copy_to_host(parameter)
                for name, parameter in parameters.items()
                if name not in slices and _changes_when_rounded(parameter.detach(), dtype)
            }
        self._names_on_main = set(ranks.all_gather_object(list(self._complete))[0])

    @property
    def names(self) -> list[str]:
        """Parameters that are not trained."""
        return list(self._parameters)

    def gather(self, name: str, owners: Collection[int]) -> torch.Tensor | None:
        """The complete float32 weight in host memory on the ranks in `owners`, None elsewhere; a collective."""
        parameter = self._parameters[name]
        is_owner = self._ranks.info.rank in owners
        shape = full_shape(parameter)
        if name in self._slices:
            slice_numel = -(-shape.numel() // self._ranks.info.world_size)
            gathered = [self._ranks.gather_cpu(self._slices[name].values, slice_numel, rank) for rank in sorted(owners)]
            # The last slices are padded after the last element.
            return next((slices[: shape.numel()].view(shape) for slices in gathered if slices is not None), None)
        if name in self._names_on_main:
            if set(owners) == {0}:
                return self._complete.get(name)
            complete = self._ranks.broadcast_cpu(self._complete.get(name), shape)
            return complete if is_owner else None
        if is_partitioned(parameter):
            with deepspeed.zero.GatheredParameters([parameter]):
                return _copy_to_host(parameter) if is_owner else None
        return _copy_to_host(parameter) if is_owner else None


def _changes_when_rounded(values: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether values change where they are stored in `dtype`."""
    return not torch.equal(values.to(dtype).to(values.dtype), values)


def _copy_to_host(parameter: nn.Parameter) -> torch.Tensor:
    return parameter.detach().to("cpu", torch.float32, copy=True)
