"""Weights that are not trained, as they were loaded: under LoRA all but the adapters.

In 16 bits DeepSpeed rounds them. What an export holds must not have lost bits, and must not be read from its source
again, which may have changed since or hold nothing of what was drawn at random. So what rounding would change is kept
beside the engine in host memory, sharded where the network was built in shards, on rank 0 elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from torch import nn

from das_ds.distributed.process_group import ProcessGroup
from das_ds.engine.sharded_init import Slice

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class FrozenWeights:
    """Made before DeepSpeed takes the network over; every method is called on all ranks.

    Args:
        parameters: name -> parameter that is not trained.
        exact: parameter name -> this rank's values, where the model was born in shards; those of `parameters` are
            taken out.
        precision: `train.precision`.
        ranks: the process group.
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter], exact: dict[str, Slice], precision: str, ranks: ProcessGroup
    ) -> None:
        self._parameters, self._ranks = parameters, ranks
        self._slices: dict[str, Slice] = {}
        self._whole: dict[str, torch.Tensor] = {}
        self._kept_by_main: set[str] = set()
        slices = {name: exact.pop(name) for name in parameters if name in exact}
        if precision == "fp32":
            return
        dtype = DTYPES[precision]
        own = {name for name, piece in slices.items() if _is_rounded(piece.values, dtype)}
        # A rank whose slice survives rounding still has to take part where that of another does not.
        rounded = set().union(*ranks.gather(own))
        self._slices = {name: piece for name, piece in slices.items() if name in rounded}
        if ranks.info.is_main:
            self._whole = {
                name: _on_host(parameter)
                for name, parameter in parameters.items()
                if name not in slices and _is_rounded(parameter.detach(), dtype)
            }
        self._kept_by_main = set(ranks.gather(list(self._whole))[0])

    def gathered(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """(name, whole float32 weight in host memory) in turn; None but on rank 0. Collective for sharded weights."""
        for name, parameter in self._parameters.items():
            yield name, self._gather(name, parameter)

    def _gather(self, name: str, parameter: Any) -> torch.Tensor | None:
        is_main = self._ranks.info.is_main
        if name in self._slices:
            shape = parameter.ds_shape
            part = -(-shape.numel() // self._ranks.info.world_size)
            parts = self._ranks.all_gather_cpu(self._slices[name].values, part)
            return parts[: shape.numel()].view(shape) if is_main else None
        if name in self._kept_by_main:
            return self._whole.get(name)
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter]):
                return _on_host(parameter) if is_main else None
        return _on_host(parameter) if is_main else None


def _is_rounded(values: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether values change where they are stored in `dtype`."""
    return not torch.equal(values.to(dtype).to(values.dtype), values)


def _on_host(parameter: nn.Parameter) -> torch.Tensor:
    return parameter.detach().to("cpu", torch.float32, copy=True)
