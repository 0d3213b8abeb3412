"""A precision that the device does not have is named before anything is built."""

from __future__ import annotations

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from das_ds.distributed.precision import check_precision, slow_here
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


def test_a_format_that_the_cpu_lacks_is_slow_and_a_gpu_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)
    assert slow_here("fp32") == slow_here("bf16") == ""
    assert slow_here("fp16") == "this CPU has no instructions for fp16, which is many times slower here than fp32"
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert slow_here("bf16").startswith("this CPU has no instructions for bf16")
    monkeypatch.setattr(get_accelerator(), "device_name", lambda: "cuda")
    assert slow_here("bf16") == slow_here("fp16") == ""
