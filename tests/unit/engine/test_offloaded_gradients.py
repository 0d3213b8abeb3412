"""Gradients in host memory are read after the copies that bring them there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from das_ds.distributed.state import Shard
from das_ds.engine import zero


class LateAccelerator:
    """Copies arrive when it is waited for."""

    def __init__(self, flat: torch.Tensor) -> None:
        self._flat = flat

    def synchronize(self) -> None:
        assert self._flat.grad is not None
        self._flat.grad.fill_(1.0)


def offloaded(stage: int, flat: torch.nn.Parameter) -> tuple[Any, dict[str, Any]]:
    """An engine and its parameters, with all that `get_gradients` reads."""
    parameter: Any = SimpleNamespace(_index_in_param_group=0)
    parameter._hp_mapping = SimpleNamespace(get_lp_grad_fragment=lambda _: flat.grad)
    kind: Any = DeepSpeedZeroOptimizer_Stage3 if stage == 3 else DeepSpeedZeroOptimizer
    optimizer = object.__new__(kind)
    setattr(optimizer, "offload_optimizer" if stage == 3 else "cpu_offload", True)
    return SimpleNamespace(optimizer=optimizer), {"w": parameter}


@pytest.mark.parametrize("stage", [2, 3])
def test_get_gradients_waits_for_copies_to_the_host(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = torch.nn.Parameter(torch.zeros(4))
    flat.grad = torch.zeros(4)
    monkeypatch.setattr(zero, "get_accelerator", lambda: LateAccelerator(flat))
    engine, parameters = offloaded(stage, flat)
    find = zero.get_gradients(engine, [Shard("w", flat, 0, 0, 4)], parameters)
    assert not flat.grad.any()
    assert torch.equal(find()[0], torch.ones(4))
