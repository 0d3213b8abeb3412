"""A precision that the device does not have is named before anything is built."""

from __future__ import annotations

import pytest
from deepspeed.accelerator import get_accelerator

from das_ds.distributed.precision import check_precision
from das_ds.errors import ConfigError


def test_unsupported_precision_lists_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    monkeypatch.setattr(get_accelerator(), "is_bf16_supported", lambda: True)
    with pytest.raises(
        ConfigError, match=r"train\.precision: found fp16, which this device .* allowed here: fp32, bf16"
    ):
        check_precision("fp16")
    check_precision("bf16")
    monkeypatch.setattr(get_accelerator(), "is_bf16_supported", lambda: False)
    with pytest.raises(ConfigError, match=r"found bf16, .* allowed here: fp32"):
        check_precision("bf16")
    check_precision("fp32")
