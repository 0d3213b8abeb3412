"""Model FLOPs of a run's tokens, counted by torch, and peaks of devices."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from das_ds.config import RunConfig, TrainConfig
from das_ds.models.architectures.registry import spec_for
from das_ds.models.flops import run_step_flops
from das_ds.models.language_model import LanguageModel
from das_ds.training import utilization
from das_ds.training.utilization import build_utilization, device_peak
from helpers.configs import LENGTH, base_values
from helpers.tiny_models import tiny_model
from helpers.tiny_tokenizer import tiny_tokenizer


@pytest.mark.parametrize("changes", [{}, {"model": {"lora": {"rank": 2}}}])
def test_flops_of_a_step_are_those_of_its_matrix_products(changes: dict[str, Any]) -> None:
    model = tiny_model("llama").eval()
    values = base_values("unused")
    model_section = {"config": {"model_type": "llama"}, **changes.get("model", {})}
    config = RunConfig.model_validate({**values, "model": model_section, "method": {"name": "ncl"}})
    found = run_step_flops(model, config, "clm", 2).total
    model.set_attn_implementation("eager")
    ids = torch.randint(0, 90, (config.train.global_batch_size, LENGTH))
    positions = torch.arange(ids.numel())
    for name, parameter in model.named_parameters():
        # Without gradients of the layers' weights, as LoRA trains, but with those of what flows through them.
        parameter.requires_grad_("embed_tokens" in name or not changes)
    with FlopCounterMode(display=False) as counter:
        LanguageModel(model, spec_for("llama"))(ids, positions, ids.flatten())[1].sum().backward()
    assert found == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_utilization_of_a_run_counts_tokens_and_ranks(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig.model_validate({**base_values(tmp_path), "method": {"name": "ncl"}})
    info = SimpleNamespace(world_size=3, device=torch.device("cpu"))
    context: Any = SimpleNamespace(
        objective="mlm",
        layout=SimpleNamespace(num_layers=12),
        engine=SimpleNamespace(ranks=SimpleNamespace(info=info)),
    )
    data: Any = SimpleNamespace(base_tokenizer=tiny_tokenizer())
    built = []

    def keep(network: Any, *args: Any) -> Any:
        built.append(network)
        return run_step_flops(network, *args)

    monkeypatch.setattr(utilization, "run_step_flops", keep)
    found = build_utilization(config, context, data)
    assert (found.num_devices, found.peak) == (3, None)
    # No memory for weights.
    assert all(parameter.is_meta for parameter in built[0].parameters())
    num_tokens = config.train.global_batch_size * LENGTH
    assert found.flops_per_token == run_step_flops(built[0], config, "mlm", 12).total / num_tokens


@pytest.mark.parametrize(
    ("precision", "matmul", "expected"),
    [("bf16", "highest", 989.4e12), ("fp32", "highest", 66.9e12), ("fp32", "high", 494.7e12)],
)
def test_device_peak_is_that_of_the_matrix_products(
    precision: str, matmul: str, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    train = TrainConfig.model_validate({"precision": precision, "matmul_precision": matmul})
    assert device_peak(torch.device("cuda"), train) == pytest.approx(expected)
    assert device_peak(torch.device("cpu"), train) is None
