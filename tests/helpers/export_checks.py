"""Exports of every form against the model that the engine was made from, and against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from das_ds.config import LoraConfig
from das_ds.models.architectures.registry import spec_for
from das_ds.storage import CHECKSUM_FILE, find_corrupted
from das_ds.training.export import ExportFormat
from helpers.exports import export_all, export_config, export_on_full_disk, stored_weights
from helpers.lora import adapted
from helpers.run_ranks import run_ranks
from helpers.tiny_models import tiny_model

SHARD = 12_000
FORMS = {
    "one": ExportFormat(),
    "many": ExportFormat(max_shard_bytes=SHARD),
    "half": ExportFormat(torch.bfloat16, max_shard_bytes=SHARD),
    "cut": ExportFormat(max_shard_bytes=SHARD, num_rows=90),
}


def load(folder: Path, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Weights as transformers loads them, in the dtype that config.json names."""
    auto: Any = AutoModelForMaskedLM if spec_for(model.config.model_type).objective == "mlm" else AutoModelForCausalLM
    loaded, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    weights: dict[str, torch.Tensor] = loaded.state_dict()
    return weights


def check_sharded_export_equals_one_file(
    model_type: str, stage: int, world_size: int, precision: str, folder: Path
) -> None:
    """Every form holds the weights of the base model to the last bit, though an engine in 16 bits runs rounded ones."""
    base = tiny_model(model_type)
    base.save_pretrained(folder / "base")
    found = run_ranks(export_all, world_size, export_config(folder, folder / "base", stage, precision), FORMS)
    expected = base.state_dict()
    one, many, half, cut = (load(folder / name / "model", base) for name in FORMS)
    assert one.keys() == many.keys() == expected.keys()
    assert all(torch.equal(one[name], expected[name]) and torch.equal(many[name], one[name]) for name in expected)
    assert all(torch.equal(half[name], expected[name].to(torch.bfloat16)) for name in expected)
    for name, weight in cut.items():
        assert torch.equal(weight, expected[name][:90] if len(expected[name]) == 100 else expected[name])
    for name in FORMS:
        model = folder / name / "model"
        stored_weights(model)
        assert find_corrupted(model) == []
        listed = {line.split("  ")[1] for line in (model / CHECKSUM_FILE).read_text().splitlines()}
        files = {path.name for path in model.iterdir()}
        assert listed == files - {CHECKSUM_FILE, "README.md"}
        assert [path.name for path in (folder / name).iterdir()] == ["model"]
    # One file by one rank; several by all of them, each by one.
    assert [rank["one"].written for rank in found] == [["model.safetensors"], *[[]] * (world_size - 1)]
    written = [name for rank in found for name in rank["many"].written]
    assert sorted(written) == sorted(path.name for path in (folder / "many" / "model").glob("*.safetensors"))
    assert all(rank["many"].written for rank in found)


def check_lora_export(stage: int, world_size: int, precision: str, folder: Path) -> None:
    """The merged network and the adapters."""
    base = tiny_model()
    base.save_pretrained(folder / "base")
    lora = {"rank": 4, "alpha": 8.0, "target_modules": ["query", "output.dense"]}
    planned, adapters = adapted(tiny_model(), spec_for("roberta"), LoraConfig(**lora), folder / "start")
    config = export_config(folder, folder / "base", stage, precision, lora={**lora, "init_from": str(folder / "start")})
    run_ranks(export_all, world_size, config, {name: FORMS[name] for name in ("one", "many")})
    one, many = (load(folder / name / "model", base) for name in ("one", "many"))
    expected = dict(base.state_dict())
    for linear in planned.linears:
        expected[linear.weight] = expected[linear.weight] + 2.0 * adapters[linear.b] @ adapters[linear.a]
    changed = {linear.weight for linear in planned.linears}
    for name, weight in expected.items():
        assert torch.equal(one[name], many[name])
        if name in changed:
            torch.testing.assert_close(one[name], weight, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(one[name], weight), name
    for name in ("one", "many"):
        saved = (folder / name / "adapter" / "adapter_model.safetensors").read_bytes()
        assert saved == (folder / "start" / "adapter_model.safetensors").read_bytes()


def check_full_disk_publishes_nothing(stage: int, world_size: int, full_rank: int, folder: Path) -> None:
    """All ranks end with the same error, nothing is left, and the same export succeeds once there is room."""
    base = tiny_model()
    base.save_pretrained(folder / "base")
    config = export_config(folder, folder / "base", stage)
    found = run_ranks(export_on_full_disk, world_size, config, FORMS["many"], full_rank)
    message = f"cannot write the model to {folder / 'full' / 'model'}: No space left on device"
    assert found == [(message, [])] * world_size
    weights = load(folder / "full" / "model", base)
    assert all(torch.equal(weights[name], weight) for name, weight in base.state_dict().items())


def check_no_rank_has_the_model(stage: int, world_size: int, folder: Path) -> None:
    """Tensors that any rank allocates: a file, and copies of the weight that is gathered and stored."""
    base = tiny_model("llama", num_hidden_layers=24)
    base.save_pretrained(folder / "base")
    forms = {"many": ExportFormat(max_shard_bytes=20_000)}
    found = run_ranks(export_all, world_size, export_config(folder, folder / "base", stage), forms)
    model = sum(weight.nbytes for weight in base.parameters())
    largest = max(weight.nbytes for weight in base.parameters())
    assert model > 400_000
    for rank in found:
        assert rank["many"].peak <= 20_000 + 4 * largest
        assert rank["many"].peak < 0.1 * model
