"""Plans of exports, compared with what transformers' `save_pretrained` writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from das_ds.models.export_plan import ExportPlan, main_names, plan_export, to_stored
from helpers.tiny_models import CONFIGS, tiny_model

SHARD = 20_000


def weights_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    tensors = dict(model.named_parameters())
    stored = model.state_dict()
    tensors |= {name: buffer for name, buffer in model.named_buffers() if name in stored}
    names = main_names(model, tensors)
    return {names[name]: tensor.detach() for name, tensor in tensors.items()}


def plan(model_type: str, max_shard_bytes: int) -> ExportPlan:
    model = tiny_model(model_type)
    weights = weights_of(model)
    return plan_export(
        model, {name: weights[name].to("meta") for name in model.state_dict() if name in weights}, max_shard_bytes
    )


@pytest.mark.parametrize("model_type", CONFIGS)
def test_plan_has_tensors_of_save_pretrained(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    found = plan(model_type, 10**9)
    assert list(found.files) == ["model.safetensors"] and found.index is None
    assert set(found.files["model.safetensors"]) == expected.keys()
    # Group by group, as ranks do that never hold all of them.
    weights = weights_of(model)
    for group in found.groups:
        tensors = to_stored(model, {name: weights[name] for name in group.sources})
        assert tuple(tensors) == group.targets
        assert all(torch.equal(tensors[name], expected[name]) for name in tensors)


@pytest.mark.parametrize("model_type", ["roberta", "gpt2", "llama"])
def test_plan_has_files_of_save_pretrained(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path, max_shard_size=SHARD)
    found = plan(model_type, SHARD)
    assert len(found.files) > 2
    for name, tensors in found.files.items():
        assert load_file(tmp_path / name).keys() == set(tensors)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert found.index is not None
    assert found.index["weight_map"] == index["weight_map"]
    assert found.index["metadata"]["total_size"] == index["metadata"]["total_size"]


def test_plan_divides_experts_that_transformers_keeps_in_one_file(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    found = plan("qwen3_moe", SHARD)
    sizes = {name: sum(expected[tensor].nbytes for tensor in tensors) for name, tensors in found.files.items()}
    largest = max(weight.nbytes for weight in expected.values())
    assert max(sizes.values()) <= SHARD
    # Another tensor would not have fit into any file but the last.
    assert min(list(sizes.values())[:-1]) > SHARD - largest
    assert sorted(tensor for tensors in found.files.values() for tensor in tensors) == sorted(expected)


def test_main_names_of_tied_weights_are_those_of_embeddings() -> None:
    model = tiny_model("xlm-roberta")
    embedding = "roberta.embeddings.word_embeddings.weight"
    # The head comes first there.
    names = [name for name, _ in model.named_parameters()]
    assert "lm_head.decoder.weight" in names and embedding not in names
    assert main_names(model, names)["lm_head.decoder.weight"] == embedding
    # Untied, each has its own.
    assert main_names(model, [*names, embedding])["lm_head.decoder.weight"] == "lm_head.decoder.weight"


def test_plan_experts_are_converted_together_and_other_weights_alone() -> None:
    found = plan("mixtral", 10**9)
    (fused,) = [group for group in found.groups if group.sources == ("model.layers.0.mlp.experts.gate_up_proj",)]
    num_experts = tiny_model("mixtral").config.num_local_experts
    assert len(fused.targets) == 2 * num_experts
    assert found.groups_of(fused.targets[:1]) == [fused]
    (norm,) = [group for group in found.groups if group.sources == ("model.norm.weight",)]
    assert norm.targets == ("model.norm.weight",)
