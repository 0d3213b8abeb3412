"""Exported models: the type of their weights, and their card."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from das_ds.config import RunConfig
from das_ds.config.io import config_differences
from das_ds.errors import ConfigError, RunFolderError
from das_ds.storage import MODEL_CARD, StagedDir
from das_ds.training import export
from das_ds.training.export import export_dtype
from das_ds.training.model_card import model_card, write_model_card
from helpers.runs import small_run
from helpers.tiny_models import tiny_model


def run(folder: Path, dtype: str, base: str | None = None) -> RunConfig:
    values = small_run(folder, export={"dtype": dtype})
    return RunConfig(**(values if base is None else {**values, "model": {"name_or_path": base}}))


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16])
def test_export_dtype_base_is_dtype_of_base_model(saved: torch.dtype, tmp_path: Path) -> None:
    tiny_model().to(saved).save_pretrained(tmp_path / "base")
    assert export_dtype(run(tmp_path, "base", str(tmp_path / "base"))) == saved
    assert export_dtype(run(tmp_path, "bf16", str(tmp_path / "base"))) == torch.bfloat16
    assert export_dtype(run(tmp_path, "fp32", str(tmp_path / "base"))) == torch.float32


def test_export_dtype_base_without_dtype_is_fp32(tmp_path: Path) -> None:
    assert export_dtype(run(tmp_path, "base")) == torch.float32


def test_export_dtype_unsupported_raises(tmp_path: Path) -> None:
    config = run(tmp_path, "base")
    assert config.model.config is not None
    config.model.config["dtype"] = "float8_e4m3fn"
    with pytest.raises(ConfigError) as caught:
        export_dtype(config)
    assert str(caught.value) == (
        "export.dtype: found base, but the base model is in torch.float8_e4m3fn; allowed here: fp32, bf16"
    )


def test_export_dtype_may_change_on_resume(tmp_path: Path) -> None:
    assert config_differences(run(tmp_path, "fp32"), run(tmp_path, "bf16")) == []


def test_publish_without_a_file_of_another_rank_raises(tmp_path: Path) -> None:
    staged = StagedDir(tmp_path / "model")
    staged.create()
    (staged.partial / "model-00001-of-00002.safetensors").touch()
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    with pytest.raises(RunFolderError) as caught:
        export._publish(staged, dict.fromkeys(names, "0"))
    assert str(caught.value) == (
        f"{staged.partial / names[1]}: found no such file on rank 0, though another rank wrote it; output_dir must be "
        "on a file system that all nodes share"
    )
    assert not staged.folder.exists()


def test_model_card_names_the_base_as_given_and_how_to_load_the_model(tmp_path: Path) -> None:
    card = model_card(run(tmp_path, "fp32", "some/base"), 1, "clm")
    folder = tmp_path / "run" / "domains" / "00_food" / "model"
    assert "method `das`, from some/base." in card
    assert f'AutoModelForCausalLM.from_pretrained("{folder}")' in card
    assert "Held-out loss" not in card


def test_model_card_names_folder_and_steps_of_a_model_of_another_step(tmp_path: Path) -> None:
    config = run(tmp_path, "fp32")
    assert f"; {config.train.steps_per_domain} steps of " in model_card(config, 2, "mlm")
    card = model_card(config, 2, "mlm", num_steps=3, name="best")
    assert (
        f"; {config.train.steps_per_domain}, 3 steps of " in card
        and f'from_pretrained("{tmp_path}/run/domains/01_papers/best")' in card
    )


def test_model_card_has_losses_once_the_model_was_evaluated(tmp_path: Path) -> None:
    card = model_card(run(tmp_path, "fp32"), 2, "mlm", {"food": (5.7, 5.6), "general": (4.0, 4.25)})
    assert "Domains in order: food, papers;" in card
    assert card.endswith(
        "| corpus | before training | after papers |\n|---|---:|---:|\n"
        "| food | 5.7000 | 5.6000 |\n| general | 4.0000 | 4.2500 |\n"
    )


def test_write_model_card_without_model_writes_nothing(tmp_path: Path) -> None:
    write_model_card(tmp_path / "moved", "card")
    assert not (tmp_path / "moved").exists()


def test_write_model_card_unwritable_is_error_of_the_run_folder(tmp_path: Path) -> None:
    (tmp_path / MODEL_CARD / "taken").mkdir(parents=True)
    with pytest.raises(RunFolderError, match=rf"{MODEL_CARD}: cannot be written \("):
        write_model_card(tmp_path, "card")
