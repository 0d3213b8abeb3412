"""DeepSpeed engines that a protector refuses; those that it masks are in `tests/smoke` and `tests/full`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from das_ds.engine import zero
from das_ds.errors import ConfigError
from das_ds.integrations import Protector
from das_ds.integrations.zero_steps import ZeroSteps
from helpers.single_rank import SingleRank


class DeepSpeedEngine:
    """What is asked of an engine of stage 0 in float32."""

    def __init__(self, **changes: Any) -> None:
        self.module = nn.Linear(3, 2)
        self.optimizer = self.basic_optimizer = torch.optim.SGD(self.module.parameters(), lr=0.1)
        self.data_parallel_group = None
        self.offload: Any = SimpleNamespace(device="none")
        self.param: Any = None
        self.is_managed = True
        self.is_fp16 = False
        vars(self).update(changes)

    def zero_offload_optimizer(self) -> Any:
        return self.offload

    def zero_offload_param(self) -> Any:
        return self.param

    def managed_gradient_accumulation(self) -> bool:
        return self.is_managed

    def fp16_enabled(self) -> bool:
        return self.is_fp16


@pytest.fixture(autouse=True)
def _one_of_two_data_parallel_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {None: 1, "half": 2, "all": 4}
    monkeypatch.setattr(zero.dist, "get_world_size", lambda group=None: sizes[group])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offload": SimpleNamespace(device="cpu")}, "found zero_optimization.offload_optimizer.device cpu"),
        ({"param": SimpleNamespace(device="nvme")}, "found zero_optimization.offload_param.device nvme"),
        ({"zenflow": True}, "found zenflow"),
        ({"data_parallel_group": "half"}, "found 2 data-parallel ranks of 1, expected all"),
        ({"is_managed": False}, "found managed_gradient_accumulation false, expected true"),
        ({"optimizer": object()}, "wrap the optimizer in object"),
    ],
)
def test_engine_that_cannot_be_masked_is_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        Protector(DeepSpeedEngine(**changes))  # type: ignore[arg-type]
    assert str(raised.value).startswith("deepspeed: ")


def test_engine_steps_no_other_optimizer() -> None:
    engine: Any = DeepSpeedEngine()
    protector = Protector(engine)
    with pytest.raises(
        ConfigError, match=r"optimizer: found SGD, but DeepSpeed steps its own; expected wrap\(\) alone"
    ):
        protector.wrap(engine.optimizer)


def test_gradients_in_fp16_are_not_measured() -> None:
    engine: Any = DeepSpeedEngine(is_fp16=True)
    steps = ZeroSteps(engine, dict(engine.module.named_parameters()), SingleRank())  # type: ignore[arg-type]
    with (
        pytest.raises(ConfigError, match="method: found parameter with DeepSpeed in fp16"),
        steps.accumulate_importance("abs_grad"),
    ):
        pass
