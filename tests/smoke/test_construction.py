"""Sharded initialization at ZeRO 3 equals the plain construction, random or pre-trained, at any precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from das_ds.config import ModelConfig
from das_ds.config.deepspeed import EngineConfig
from das_ds.engine.sharded_init import sharded_init
from das_ds.models.loading import load_model
from helpers.construction import random_equal_to_plain, weights_of_loaded
from helpers.run_ranks import run_ranks
from helpers.tiny_models import NO_DROPOUT, SIZES, tiny_model

pytestmark = pytest.mark.multirank

DECODER: dict[str, Any] = {**SIZES, "num_key_value_heads": 3, "head_dim": 8}
EXPERTS: dict[str, Any] = {**DECODER, "num_experts": 4, "moe_intermediate_size": 16}
GPT2: dict[str, Any] = {"vocab_size": 101, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 40}


def random_roberta(**changes: Any) -> ModelConfig:
    return ModelConfig(config={"model_type": "roberta", **SIZES, **NO_DROPOUT, **changes})


def check(found: list[dict[str, Any]], expected: torch.nn.Module) -> None:
    """Every weight is exact in every precision; the network computes with it."""
    weights = dict(expected.named_parameters())
    buffers = dict(expected.named_buffers())
    for loaded in found:
        assert loaded["weights"].keys() == weights.keys()
        assert all(torch.equal(value, weights[name]) for name, value in loaded["weights"].items())
        assert all(torch.equal(value, buffers[name]) for name, value in loaded["buffers"].items())
        assert loaded["decayed"] == [name for name, weight in weights.items() if weight.dim() > 1]
    hidden = expected.eval().base_model(torch.arange(20).view(2, 10)).last_hidden_state  # type: ignore[union-attr,operator]
    torch.testing.assert_close(found[0]["output"][0], hidden, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("world_size", [1, 2])
def test_from_config_weights_equal_other_stages(world_size: int, tmp_path: Path) -> None:
    config = random_roberta(vocab_size=101)
    plain, _ = load_model(config, seed=7, vocab_size=100)
    results = run_ranks(weights_of_loaded, world_size, tmp_path, config, 7, ("fp32", "bf16", "fp16"))
    for found in results:
        check(found, plain)
    for name, weight in plain.named_parameters():
        held = [found[1]["held"][name] for found in results]
        assert sum(held) == weight.numel() and max(held) == -(-weight.numel() // world_size)


def test_from_config_every_architecture_equals_plain() -> None:
    cases = [
        *((name, SIZES) for name in ("bert", "electra", "deberta-v2", "modernbert")),
        *((name, DECODER) for name in ("llama", "qwen3", "gemma2", "phi3")),
        ("gpt2", GPT2),
        ("qwen3_moe", EXPERTS),
    ]
    assert run_ranks(random_equal_to_plain, 2, cases) == [[], []]


def test_from_pretrained_reads_slices(tmp_path: Path) -> None:
    # Several files, one of them of another type.
    model = tiny_model("bert", **NO_DROPOUT)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    file = sorted(tmp_path.glob("*.safetensors"))[0]
    stored = {name: value.to(torch.bfloat16) for name, value in load_file(file).items()}
    save_file(stored, file, metadata={"format": "pt"})
    config = ModelConfig(name_or_path=str(tmp_path))
    plain, _ = load_model(config, seed=0, vocab_size=100)
    for found in run_ranks(weights_of_loaded, 2, tmp_path, config, 0, ("fp32", "fp16")):
        check(found, plain)


def test_from_pretrained_experts_never_complete_on_a_rank(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    config = ModelConfig(name_or_path=str(tmp_path))
    plain, _ = load_model(config, seed=0, vocab_size=100)
    for found in run_ranks(weights_of_loaded, 2, tmp_path, config, 0, ("bf16",)):
        weights = dict(plain.named_parameters())
        assert all(torch.equal(value, weights[name]) for name, value in found[0]["weights"].items())
        assert all(found[0]["held"][name] == -(-weight.numel() // 2) for name, weight in weights.items())


def test_sharded_init_other_stages_none() -> None:
    for zero in ({"stage": 2}, {"stage": 3, "zero_hpz_partition_size": 2}):
        assert sharded_init(EngineConfig.from_raw({"zero_optimization": zero}), None) is None  # type: ignore[arg-type]
