"""Exports at every ZeRO stage and number of ranks: equal to one file, merged and adapters alone, on a full disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load

from helpers.export_checks import (
    check_full_disk_publishes_nothing,
    check_lora_export,
    check_no_rank_has_the_model,
    check_sharded_export_equals_one_file,
)
from helpers.exports import run_with_hub
from helpers.fake_hub import fake_hub
from helpers.run_ranks import run_ranks
from helpers.runs import exported_weights, small_run
from helpers.writable_hub import WritableHub

pytestmark = pytest.mark.multirank


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_export_sharded_equals_one_file(stage: int, world_size: int, precision: str, tmp_path: Path) -> None:
    check_sharded_export_equals_one_file("roberta", stage, world_size, precision, tmp_path)


# A head that comes before the embedding that it is tied to; experts that are stored one by one.
@pytest.mark.parametrize("model_type", ["xlm-roberta", "mixtral"])
@pytest.mark.parametrize(("stage", "world_size"), [(2, 2), (3, 3)])
def test_export_sharded_equals_one_file_of_other_architectures(
    model_type: str, stage: int, world_size: int, tmp_path: Path
) -> None:
    check_sharded_export_equals_one_file(model_type, stage, world_size, "bf16", tmp_path)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("stage", "world_size"), [(0, 2), (2, 1), (2, 3), (3, 1), (3, 2), (3, 3)])
def test_export_lora_merged_and_adapters(stage: int, world_size: int, precision: str, tmp_path: Path) -> None:
    check_lora_export(stage, world_size, precision, tmp_path)


@pytest.mark.parametrize(("stage", "world_size"), [(0, 1), (1, 2), (2, 2), (3, 2)])
def test_export_no_rank_has_the_model(stage: int, world_size: int, tmp_path: Path) -> None:
    check_no_rank_has_the_model(stage, world_size, tmp_path)


@pytest.mark.parametrize("full_rank", [0, 1])
def test_export_full_disk_of_any_rank_publishes_nothing(full_rank: int, tmp_path: Path) -> None:
    check_full_disk_publishes_nothing(3, 2, full_rank, tmp_path)


def test_run_uploads_models_with_their_losses_and_a_later_start_those_that_are_missing(tmp_path: Path) -> None:
    hub = {"push_to_hub": True, "hub_model_id": "owner/papers"}
    values = small_run(tmp_path, method={"name": "ncl"}, deepspeed={"zero_optimization": {"stage": 3}}, export=hub)
    nobody = "http://127.0.0.1:1"
    # Without an answer the run is complete all the same.
    assert run_ranks(run_with_hub, 2, values, nobody) == [True, True]
    with fake_hub(WritableHub) as served:
        assert run_ranks(run_with_hub, 2, values, served.endpoint) == [True, True]
    repository = served.repositories["owner/papers"]
    assert list(repository.tags) == ["food", "papers"] and repository.tags["papers"] == repository.head
    for index, name in enumerate(repository.tags):
        folder = tmp_path / "run" / "domains" / f"{index:02d}_{name}"
        uploaded = repository.files(name)
        assert load(uploaded["model.safetensors"]).keys() == exported_weights(tmp_path / "run", folder.name).keys()
        assert uploaded["model.safetensors"] == (folder / "model" / "model.safetensors").read_bytes()
        assert f"| corpus | before training | after {name} |" in uploaded["README.md"].decode()
        assert (folder / "hub.json").exists()
