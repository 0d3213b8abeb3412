"""DeepSpeed's own optimizers, which are compiled when they are first asked for, under a mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.optimizers import Make, check_pulled_back_in_chunks


def cpu_adam(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(groups, lr=1e-2, weight_decay=0.1, adamw_mode=True)


def cpu_lion(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    from deepspeed.ops.lion import DeepSpeedCPULion

    return DeepSpeedCPULion(groups, lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("make", [cpu_adam, cpu_lion])
def test_compiled_optimizer_is_pulled_back_in_chunks(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    check_pulled_back_in_chunks(make, monkeypatch)
