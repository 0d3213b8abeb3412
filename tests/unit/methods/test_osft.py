"""Settings of OSFT; its training is compared with float64 in `tests/smoke/test_osft.py`."""

from __future__ import annotations

import pytest

from das_ds.config.deepspeed import build_engine_config
from das_ds.errors import ConfigError
from das_ds.methods import METHODS
from helpers.configs import make_config


def test_osft_with_lora_is_error() -> None:
    config = make_config("run", "method=osft", "model.lora={rank: 2}")
    message = r"model.lora: found adapters with method osft, which freezes .*; expected null, or another method"
    with pytest.raises(ConfigError, match=message):
        build_engine_config(config, world_size=1)
    build_engine_config(make_config("run", "method=osft"), world_size=1)


@pytest.mark.parametrize("ratio", [-0.1, 1.5])
def test_osft_ratio_out_of_range_is_error(ratio: float) -> None:
    with pytest.raises(ConfigError, match=rf"method.unfreeze_rank_ratio: found {ratio}, allowed: number >= 0 and <= 1"):
        make_config("run", f"method={{name: osft, unfreeze_rank_ratio: {ratio}}}")


def test_osft_default_ratio_is_that_of_training_hub() -> None:
    assert METHODS["osft"].Config.model_validate({}).unfreeze_rank_ratio == 0.25
