"""Parts of the divergence from the base model that need no engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from das_ds.config import RunConfig
from das_ds.errors import ConfigError
from das_ds.models.size import ModelSize, Sharding
from das_ds.training.base_divergence import BaseDivergence, base_divergence_memory
from helpers.configs import make_config


def test_head_that_is_no_linear_layer_is_refused() -> None:
    context: Any = SimpleNamespace(network=SimpleNamespace(can_distill=False))
    with pytest.raises(ConfigError, match=r"^evaluation.base_divergence: found true with an LM head that does not end"):
        BaseDivergence(context, cast(Any, None), cast(Any, None))


@pytest.mark.parametrize(("stage", "host", "device"), [(0, 2000, 2000), (2, 500, 2000), (3, 500, 500)])
def test_memory_of_base_weights_is_sharded_like_the_optimizer(stage: int, host: int, device: int) -> None:
    size: Any = SimpleNamespace(trained=1000)
    sharding = Sharding(stage=stage, num_ranks=4, weight_bytes=2, gradient_bytes=4, num_moments=2)
    use = base_divergence_memory(_config(True), cast(ModelSize, size), sharding)
    assert sum(use.host.values()) == host and sum(use.device_at_start.values()) == device and use.checkpoint == 2000
    assert base_divergence_memory(_config(False), cast(ModelSize, size), sharding).checkpoint == 0


def _config(measured: bool) -> RunConfig:
    return make_config("unused", f"evaluation.base_divergence={str(measured).lower()}")
