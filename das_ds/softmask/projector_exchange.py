"""Where projectors are: computed where there is room, and sent to the ranks that need them, whatever their form is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from das_ds.distributed.collectives import broadcast_among, rank
from das_ds.functional import projectors
from das_ds.functional.projectors import VectorMap

V = TypeVar("V", bound=VectorMap)


def share_projector(projector: V | None, owner: int, users: Sequence[int], device: torch.device) -> V | None:
    """A projector on the ranks that use it; a collective of these and its owner, which others may call too.

    Every tensor is sent as it is: its bytes to each user but the owner, and about a hundred bytes before. The ranks
    that receive it wait for their device.

    Args:
        projector: on its owner, a dataclass of `functional.projectors` with tensors on the device, and JSON values.
        owner: rank.
        users: ranks, the same on every rank.
        device: where it is received.

    Returns:
        The projector on users, None elsewhere; its tensors are contiguous on all of them, so that their products are
        bitwise equal: kernels sum a transposed matrix in another order.
    """
    if rank() == owner:
        projector = move_projector(projector, device)
        _send(projector, owner, users, device)
        return projector if owner in users else None
    received: V | None = _receive(owner, users, device) if rank() in users else None
    return received


def find_room(device: torch.device, num_bytes: int) -> torch.device:
    """The device, or the host where the device is a GPU that lacks this memory.

    Args:
        device: of this rank.
        num_bytes: that are needed there for a while.
    """
    if device.type != "cuda":
        return device
    free, _ = torch.cuda.mem_get_info(device)
    # What the allocator keeps and nobody uses.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return device if num_bytes <= free else torch.device("cpu")


def move_projector(projector: Any, device: torch.device) -> Any:
    """The same projector with contiguous tensors on a device; they are not copied where they are so already."""
    moved = {name: tensor.to(device) for name, tensor in _tensors(projector).items()}
    return dataclasses.replace(projector, **moved)


def _send(projector: Any, owner: int, users: Sequence[int], device: torch.device) -> None:
    header = _encode_header(projector)
    broadcast_among(torch.tensor([len(header)], device=device), owner, users)
    broadcast_among(torch.tensor(list(header), dtype=torch.uint8, device=device), owner, users)
    for tensor in _tensors(projector).values():
        broadcast_among(tensor, owner, users)


def _receive(owner: int, users: Sequence[int], device: torch.device) -> Any:
    length = torch.zeros(1, dtype=torch.int64, device=device)
    broadcast_among(length, owner, users)
    header = torch.empty(int(length), dtype=torch.uint8, device=device)
    broadcast_among(header, owner, users)
    form, values, shapes = json.loads(bytes(header.cpu().numpy()))
    for name, (shape, dtype) in shapes.items():
        values[name] = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        broadcast_among(values[name], owner, users)
    return getattr(projectors, form)(**values)


def _encode_header(projector: Any) -> bytes:
    """[name of the class, values of its fields that are no tensors, shapes and dtypes of the others] as JSON."""
    tensors = _tensors(projector)
    names = [field.name for field in dataclasses.fields(projector)]
    values = {name: getattr(projector, name) for name in names if name not in tensors}
    shapes = {name: (list(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()}
    return json.dumps([type(projector).__name__, values, shapes]).encode()


def _tensors(projector: Any) -> dict[str, torch.Tensor]:
    """Field -> its tensor, contiguous."""
    values = {field.name: getattr(projector, field.name) for field in dataclasses.fields(projector)}
    return {name: value.contiguous() for name, value in values.items() if isinstance(value, torch.Tensor)}
