"""Counts the memory of tensors that torch allocates, present and peak, on any device."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AllocationCounter(TorchDispatchMode):
    """Inside, every storage that an operation returns counts until it is freed; workspaces of operations do not."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0
        self.peak = 0
        self._live: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return result

    def ignore(self, tensors: Any) -> None:
        """Do not count what exists already, which operations may return as views."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._live.add(storage._cdata)
            weakref.finalize(storage, self._live.discard, storage._cdata)

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        # Tensors on the meta device have no memory.
        if key in self._live or storage.device.type == "meta":
            return
        self._live.add(key)
        size = storage.nbytes()
        self.num_bytes += size
        self.peak = max(self.peak, self.num_bytes)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.num_bytes -= size
