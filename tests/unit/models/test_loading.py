"""Loading models and tokenizers, and the errors of failures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, BertConfig, T5Config

from das_ds.config import ModelConfig
from das_ds.errors import ConfigError, ModelError
from das_ds.models.architectures.registry import spec_for
from das_ds.models.loading import (
    check_files,
    check_sequence_length,
    load_model,
    load_tokenizer,
    model_config,
    open_tokenizer,
)
from das_ds.storage import atomic_dir
from helpers.tiny_models import CONFIGS, SIZES, tiny_model
from helpers.tiny_tokenizer import tiny_tokenizer
from helpers.training import run_config


def random_model(**changes: Any) -> ModelConfig:
    return ModelConfig(config={"model_type": "roberta", **SIZES, **changes})


def test_load_model_random_depends_on_seed_only() -> None:
    first, _ = load_model(random_model(), seed=1, vocab_size=100)
    torch.rand(3)
    again, _ = load_model(random_model(), seed=1, vocab_size=100)
    other, _ = load_model(random_model(), seed=2, vocab_size=100)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


def test_load_model_random_has_vocab_size_of_tokenizer() -> None:
    config = {key: value for key, value in SIZES.items() if key != "vocab_size"}
    model, _ = load_model(ModelConfig(config={"model_type": "roberta", **config}), seed=0, vocab_size=77)
    assert model.get_input_embeddings().num_embeddings == 77


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_load_model_pretrained_is_float32(model_type: str, tmp_path: Path) -> None:
    saved = tiny_model(model_type)
    saved.to(torch.bfloat16).save_pretrained(tmp_path)
    model, spec = load_model(ModelConfig(name_or_path=str(tmp_path)), seed=0, vocab_size=100)
    assert spec.model_type == model_type
    for mine, theirs in zip(model.parameters(), saved.parameters(), strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, theirs.float())


def test_check_files_modified_export_raises(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with atomic_dir(folder) as partial:
        tiny_model().save_pretrained(partial)
    check_files(ModelConfig(name_or_path=str(folder)))
    check_files(ModelConfig(name_or_path="roberta-base"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ModelError, match=r"model: model\.safetensors missing or not as exported \(see SHA256SUMS\)"):
        check_files(ModelConfig(name_or_path=str(folder)))


def test_load_model_missing_folder_raises() -> None:
    with pytest.raises(ModelError, match="no_such_folder"):
        load_model(ModelConfig(name_or_path="./no_such_folder"), seed=0, vocab_size=100)


def test_load_model_without_spec_lists_known_types(tmp_path: Path) -> None:
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="'t5'; known: bert, deberta-v2"):
        load_model(ModelConfig(name_or_path=str(tmp_path)), seed=0, vocab_size=100)
    with pytest.raises(ModelError, match="model type: found 'no_such_type', which transformers does not know"):
        load_model(ModelConfig(config={"model_type": "no_such_type"}), seed=0, vocab_size=100)


def test_load_model_config_without_weights_raises(tmp_path: Path) -> None:
    BertConfig(**SIZES).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot load the model"):
        load_model(ModelConfig(name_or_path=str(tmp_path)), seed=0, vocab_size=100)


def test_load_model_damaged_weights_raises(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=f"cannot load the model '{tmp_path}'"):
        load_model(ModelConfig(name_or_path=str(tmp_path)), seed=0, vocab_size=100)


def test_load_model_indivisible_heads_raises() -> None:
    with pytest.raises(ModelError, match="hidden size"):
        load_model(random_model(num_attention_heads=7), seed=0, vocab_size=100)


@pytest.mark.parametrize("model_type", ["gemma2", "deberta-v2"])
def test_load_model_unsupported_attention_raises(model_type: str) -> None:
    config = {"model_type": model_type, **CONFIGS[model_type]}
    load_model(ModelConfig(config=config, attention="eager"), seed=0, vocab_size=100)
    with pytest.raises(
        ModelError, match=r"\(model.attention: sdpa\): .*does not support .*`attn_implementation=.eager"
    ):
        load_model(ModelConfig(config=config), seed=0, vocab_size=100)


def test_check_embeddings_too_many_tokens_raises() -> None:
    with pytest.raises(ModelError, match="tokenizer has 101 tokens, but the model has embeddings for only 100"):
        load_model(random_model(), seed=0, vocab_size=101)


def test_check_sequence_length_too_long_raises() -> None:
    model, spec = load_model(random_model(), seed=0, vocab_size=100)
    check_sequence_length(model, spec, 38)
    model(torch.full((1, 38), 7))
    with pytest.raises(ConfigError, match=r"data.sequence_length: found 39.*at most 38 tokens"):
        check_sequence_length(model, spec, 39)


def test_load_tokenizer_from_own_or_model_folder(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    own = run_config(tmp_path, data={"tokenizer": str(tmp_path)})
    models = run_config(tmp_path, model={"config": None, "name_or_path": str(tmp_path)})
    assert load_tokenizer(own).get_vocab() == load_tokenizer(models).get_vocab() == tiny_tokenizer().get_vocab()


def test_load_tokenizer_random_model_without_tokenizer_raises(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.tokenizer"):
        load_tokenizer(run_config(tmp_path))


def test_load_tokenizer_missing_folder_raises(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no_such_folder"):
        load_tokenizer(run_config(tmp_path, data={"tokenizer": "./no_such_folder"}))


@pytest.mark.parametrize("model_type", ["roberta", "bert", "xlm-roberta", "gpt2", "gemma2"])
def test_open_tokenizer_without_files_raises(model_type: str, tmp_path: Path) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(ModelError) as caught:
        open_tokenizer(str(tmp_path))
    assert str(caught.value).startswith(f"tokenizer {str(tmp_path)!r}: found no token but special ones, expected the")


def longest_block_that_runs(model: Any) -> int:
    """Found without the table: the embedding of positions has no row for a token more."""
    longest = 0
    for length in range(1, 45):
        ids = torch.full((1, length), 9)
        try:
            model(ids)
        except (IndexError, RuntimeError):
            break
        longest = length
    return longest


@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta"])
@pytest.mark.parametrize("padding", [0, 1, 5])
def test_check_sequence_length_positions_start_after_padding_index(model_type: str, padding: int) -> None:
    model = tiny_model(model_type, pad_token_id=padding)
    longest = longest_block_that_runs(model)
    assert longest == 40 - padding - 1
    spec = spec_for(model_type)
    check_sequence_length(model, spec, longest)
    with pytest.raises(ConfigError, match=rf"found {longest + 1}, but this {model_type} has positions for at most"):
        check_sequence_length(model, spec, longest + 1)


@pytest.mark.parametrize("padding", [None, 39, -1])
def test_max_sequence_length_bad_padding_index_raises(padding: int | None) -> None:
    model = tiny_model()
    model.config.pad_token_id = padding
    with pytest.raises(ModelError, match=rf"pad_token_id of the model's config: found {padding}, allowed: 0 to 38"):
        check_sequence_length(model, spec_for("roberta"), 8)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hiden_size": 24}, r"model\.config\.hiden_size: unknown key of a roberta config; did you mean hidden_size\?"),
        ({"num_layers": 2}, r"model\.config\.num_layers: unknown key of a roberta config"),
        ({"num_hidden_layers": 0}, r"model\.config\.num_hidden_layers: found 0, allowed: at least 1"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            r"model\.config\.quantization_config: found with random weights",
        ),
    ],
)
def test_model_config_ignored_keys_raise(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ModelError, match=expected):
        model_config(ModelConfig(config={"model_type": "roberta", **changes}))


def test_model_config_old_rotary_keys_are_accepted() -> None:
    found = model_config(ModelConfig(config={"model_type": "llama", "rope_theta": 500000.0}))
    assert found.rope_parameters["rope_theta"] == 500000.0
