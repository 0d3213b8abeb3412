"""A precision that the device does not have is named before anything is built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from das_ds.downstream.run import finetune_model
from das_ds.engine.loss_scaler import check_precision, emulated_precision_warning
from das_ds.engine.matmul_precision import tf32
from das_ds.errors import ConfigError
from das_ds.training.evaluate import evaluate_model
from helpers.training import run_config


def test_check_precision_unsupported_lists_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_emulated_precision_warning_on_cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)
    assert emulated_precision_warning("fp32") == emulated_precision_warning("bf16") == ""
    assert (
        emulated_precision_warning("fp16")
        == "this CPU has no instructions for fp16, which is many times slower here than fp32"
    )
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert emulated_precision_warning("bf16").startswith("this CPU has no instructions for bf16")
    monkeypatch.setattr(get_accelerator(), "device_name", lambda: "cuda")
    assert emulated_precision_warning("bf16") == emulated_precision_warning("fp16") == ""


def test_tf32_on_gpu_only_and_restored_after_error() -> None:
    before = torch.get_float32_matmul_precision()
    assert before == "highest"
    with tf32(torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(ValueError, match="inside"), tf32(torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == "high"
        raise ValueError("inside")
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("command", [evaluate_model, finetune_model])
def test_matmul_precision_set_in_commands_without_engine(
    command: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    config = run_config(tmp_path, train={"matmul_precision": "high"})
    # There are no ranks: the first use of them ends the command.
    with pytest.raises(AttributeError):
        command(config, None, tmp_path, *([[], tmp_path] if command is finetune_model else []))
    assert asked == ["high"]
