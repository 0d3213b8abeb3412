"""Classifiers on exported models: loaded weights, new head and markers, unusable folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from das_ds.config import ModelConfig
from das_ds.downstream.classifier import check_model_folder, check_task_length, load_classifier
from das_ds.errors import ConfigError, ModelError
from helpers.end_tasks import save_model
from helpers.tiny_tokenizer import TEXT, tiny_tokenizer, word_tokenizer

MARKERS = ["[[", "]]", "<<", ">>"]
WEIGHTS = "model.safetensors"


@pytest.mark.parametrize("model_type", ["bert", "roberta", "gpt2", "distilbert", "modernbert"])
def test_load_classifier_keeps_encoder_and_labels(tmp_path: Path, model_type: str) -> None:
    folder = save_model(tmp_path, model_type)
    model, _ = load_classifier(ModelConfig(name_or_path=str(folder)), ["a", "b", "c"])
    stored = load_file(folder / WEIGHTS)
    loaded = model.state_dict()
    common = set(stored) & set(loaded)
    assert len(common) > len(stored) / 2
    for name in common:
        torch.testing.assert_close(loaded[name], stored[name], rtol=0, atol=0)
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_load_classifier_head_follows_torch_seed(tmp_path: Path) -> None:
    source = ModelConfig(name_or_path=str(save_model(tmp_path)))
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        heads.append(load_classifier(source, ["a", "b"]).model.state_dict()["classifier.weight"])
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_load_classifier_markers_are_single_mean_tokens(tmp_path: Path) -> None:
    source = ModelConfig(name_or_path=str(save_model(tmp_path)))
    model, tokenizer = load_classifier(source, ["a", "b"], MARKERS)
    old = tiny_tokenizer()
    embedding = model.get_input_embeddings().weight
    assert len(embedding) == len(old) + len(MARKERS)
    for marker in MARKERS:
        (number,) = tokenizer(marker, add_special_tokens=False)["input_ids"]
        pieces = old(marker, add_special_tokens=False)["input_ids"]
        torch.testing.assert_close(embedding[number], embedding[pieces].mean(dim=0))
    assert "".join(tokenizer.tokenize("a [[ tree ]]")).count("[[") == 1


def test_load_classifier_pads_with_eos_by_default(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "gpt2")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    model, loaded = load_classifier(ModelConfig(name_or_path=str(folder)), ["a", "b"])
    assert loaded.pad_token == loaded.eos_token and model.config.pad_token_id == loaded.eos_token_id


def save_causal(folder: Path, model_type: str) -> ModelConfig:
    path = save_model(folder, model_type) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "is_decoder": True}))
    return ModelConfig(name_or_path=str(path.parent))


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra"])
def test_load_classifier_causal_encoder_raises(tmp_path: Path, model_type: str) -> None:
    """Its logits would be equal for all texts, as the first token is."""
    with pytest.raises(ModelError, match=rf"model: found is_decoder true .* type {model_type} reads the first token"):
        load_classifier(save_causal(tmp_path, model_type), ["a", "b"])


def test_load_classifier_decoder_that_says_so_is_loaded(tmp_path: Path) -> None:
    load_classifier(save_causal(tmp_path, "gpt2"), ["a", "b"])


def test_check_model_folder_incomplete_raises(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere: found no config\.json, expected the folder of a model"):
        check_model_folder(tmp_path / "nowhere")
    folder = save_model(tmp_path)
    check_model_folder(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(ModelError, match=r"model: found no weights, expected model\.safetensors"):
        check_model_folder(folder)
    with pytest.raises(ModelError, match="cannot load a classifier from"):
        load_classifier(ModelConfig(name_or_path=str(folder)), ["a", "b"])


def test_load_classifier_incomplete_weights_raise(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    weights = {name: value for name, value in load_file(folder / WEIGHTS).items() if "layer.1" not in name}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"found no weights for bert\.encoder\.layer\.1\..* expected those of a complete"
    ):
        load_classifier(ModelConfig(name_or_path=str(folder)), ["a", "b"])


def test_check_task_length_too_long_raises(tmp_path: Path) -> None:
    source = ModelConfig(name_or_path=str(save_model(tmp_path, "roberta")))
    model, _ = load_classifier(source, ["a", "b"])
    check_task_length(source, model, 38, "toy")
    with pytest.raises(ConfigError, match=r"tasks.sequence_length of toy: found 39, .* at most 38 tokens"):
        check_task_length(source, model, 39, "toy")


def test_load_classifier_reused_marker_id_raises(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    word_tokenizer(TEXT.split(), skipped=2).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"its ids have holes, and the marker '\[\[' would get one that is in use"):
        load_classifier(ModelConfig(name_or_path=str(folder)), ["a", "b"], MARKERS)
