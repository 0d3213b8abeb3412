"""Masks reach the engine once, as updates or as gradients, after the earlier ones are gone."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from das_ds.engine.mask import ElementwiseMask, GradientMask, UpdateMask
from das_ds.kernels.protection import Protection
from das_ds.softmask.apply import apply_masks
from das_ds.softmask.direction_update_mask import DirectionUpdateMask
from das_ds.softmask.mask_layout import MaskLayout


class FakeEngine:
    """The order of calls, with the number of masks."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.weights = SimpleNamespace(shards=[])

    def set_masks(self, masks: Mapping[torch.Tensor, UpdateMask], *, masks_decay: bool = True) -> None:
        self.calls.append(("update" if masks_decay else "first_moment", len(masks)))

    def set_gradient_mask(self, mask: GradientMask | None) -> None:
        self.calls.append(("gradient", 0 if mask is None else 1))

    def set_frozen(self, frozen: Mapping[str, int]) -> None:
        self.calls.append(("frozen", len(frozen)))


class FakeImportance:
    """One mask, made from settings that are recorded."""

    def __init__(self, engine: FakeEngine, mask: UpdateMask) -> None:
        self.engine = engine
        self.mask = mask

    def masks(self, settings: str) -> dict[torch.Tensor, UpdateMask]:
        self.engine.calls.append((settings, 1))
        return {torch.zeros(4): self.mask}


@pytest.mark.parametrize("apply_to", ["update", "first_moment", "gradient"])
def test_apply_masks_clears_earlier_masks_before_new_are_made(apply_to: Any) -> None:
    engine: Any = FakeEngine()
    importance = FakeImportance(engine, ElementwiseMask(Protection(4)))
    apply_masks(engine, importance, "settings", apply_to=apply_to)
    assert engine.calls == [("update", 0), ("gradient", 0), ("frozen", 0), ("settings", 1), (apply_to, 1)]


@pytest.mark.parametrize("apply_to", ["first_moment", "gradient"])
def test_apply_masks_gradient_of_direction_mask_is_refused(apply_to: Any) -> None:
    engine: Any = FakeEngine()
    importance = FakeImportance(engine, DirectionUpdateMask([], MaskLayout([], []), {}, torch.device("cpu"), 4))
    with pytest.raises(AssertionError, match="element by element"):
        apply_masks(engine, importance, "settings", apply_to=apply_to)
