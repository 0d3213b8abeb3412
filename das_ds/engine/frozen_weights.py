"""Frozen weights as they were loaded: with LoRA everything but the adapters.

In 16 bits DeepSpeed rounds them. An export must neither lose bits nor read the source again, which may have changed
since and does not have weights that were drawn at random. So the values that rounding changes are kept in host memory:
sharded where the network was initialized sharded, on rank 0 elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator

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

    def gather(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """(name, complete float32 weight in host memory) in turn; None except on rank 0. A collective where sharded."""
        for name, parameter in self._parameters.items():
            yield name, self._gather(name, parameter)

    def _gather(self, name: str, parameter: nn.Parameter) -> torch.Tensor | None:
        is_main = self._ranks.info.is_main
        if name in self._slices:
            shape = full_shape(parameter)
            slice_numel = -(-shape.numel() // self._ranks.info.world_size)
            slices = self._ranks.all_gather_cpu(self._slices[name].values, slice_numel)
            # The last slices are padded after the last element.
            return slices[: shape.numel()].view(shape) if is_main else None
        if name in self._names_on_main:
            return self._complete.get(name)
        if is_partitioned(parameter):
            with deepspeed.zero.GatheredParameters([parameter]):
                return _copy_to_host(parameter) if is_main else None
        return _copy_to_host(parameter) if is_main else None


def _changes_when_rounded(values: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether values change where they are stored in `dtype`."""
    return not torch.equal(values.to(dtype).to(values.dtype), values)


def _copy_to_host(parameter: nn.Parameter) -> torch.Tensor:
    return parameter.detach().to("cpu", torch.float32, copy=True)
