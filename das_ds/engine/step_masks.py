"""Masks of an optimizer's flat tensors: of updates, of weight decay, and of values that stay as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from das_ds.distributed.state import Shard
from das_ds.engine.mask import DecayMask, DecayMasks, UpdateMask, UpdateMasks


class StepMasks:
    """What acts on each flat tensor before and after it is stepped.

    Tensors are known by identity: DeepSpeed swaps its flat tensors in and out of `param_groups` but keeps the objects.
    """

    def __init__(self) -> None:
        self._updates: dict[int, UpdateMask] = {}
        self._decay: dict[int, DecayMask] = {}
        self._frozen: dict[int, tuple[list[slice], list[torch.Tensor]]] = {}

    def set_updates(self, masks: UpdateMasks) -> None:
        """Mask the updates of these flat tensors from now on, and of no others."""
        self._updates = {id(flat): mask for flat, mask in masks.items()}

    def set_decay(self, masks: DecayMasks) -> None:
        """Mask the weight decay of these flat tensors from now on, and of no others."""
        self._decay = {id(flat): mask for flat, mask in masks.items()}

    def set_frozen(self, frozen: Mapping[torch.Tensor, Sequence[slice]]) -> None:
        """Leave these spans of flat tensors at their present values from now on, and no others, whatever steps them."""
        self._frozen = {}
        for flat, spans in frozen.items():
            values = flat.data.view(-1)
            self._frozen[id(flat)] = (list(spans), [values[span].clone() for span in spans])

    def update_mask(self, param: torch.Tensor) -> UpdateMask | None:
        """Of the updates of a flat tensor."""
        return self._updates.get(id(param))

    def compensate_decay_(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        """Before a step, so that its decoupled decay moves weights as far as their mask allows; may be a collective.

        Args:
            param: (F,) or of any shape.
            group: its settings, `lr` and `weight_decay`.
        """
        mask = self._decay.get(id(param))
        if mask is None:
            return
        decay = group["lr"] * group.get("weight_decay", 0.0)
        if decay > 0.0:
            mask.compensate_(param.data.view(-1), decay)

    def remember_frozen_(self, param: torch.Tensor) -> None:
        """Before a step: values that were loaded since the last one stay, and not those of before."""
        if id(param) in self._frozen:
            spans, values = self._frozen[id(param)]
            flat = param.data.view(-1)
            torch._foreach_copy_(values, [flat[span] for span in spans])

    def restore_frozen_(self, param: torch.Tensor) -> None:
        """After a step, whatever optimizer and mask did."""
        if id(param) in self._frozen:
            spans, values = self._frozen[id(param)]
            flat = param.data.view(-1)
            torch._foreach_copy_([flat[span] for span in spans], values)


def frozen_spans(
    shards: Sequence[Shard], frozen: Mapping[str, int]
) -> tuple[dict[int, int], dict[torch.Tensor, list[slice]]]:
    """What `frozen` is in a rank's shards.

    Args:
        shards: this rank's.
        frozen: parameter -> how many of its first elements keep their values.

    Returns:
        Number of a shard -> how many of its first elements are frozen; flat tensor -> spans of frozen elements.
    """
    elements: dict[int, int] = {}
    spans: dict[torch.Tensor, list[slice]] = {}
    for number, shard in enumerate(shards):
        numel = min(frozen.get(shard.name, 0) - shard.param_start, shard.numel)
        if numel <= 0:
            continue
        elements[number] = numel
        in_flat = spans.setdefault(shard.flat, [])
        # A flat tensor of nothing but biases and normalization is one span, hence one copy per step.
        is_adjacent = bool(in_flat) and in_flat[-1].stop == shard.flat_start
        start = in_flat.pop().start if is_adjacent else shard.flat_start
        in_flat.append(slice(start, shard.flat_start + numel))
    return elements, spans
