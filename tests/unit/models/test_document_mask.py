"""Document masks of small models of the real classes (docs/methods/objectives.md)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from das_ds.errors import ConfigError
from das_ds.models.document_mask import check_document_mask

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 40, "word_embed_proj_dim": 24},
    "llama": GROUPED,
    # Windows shorter than a document, so that sliding layers differ from full ones.
    "mistral": {**GROUPED, "sliding_window": 3},
    "qwen2": {**GROUPED, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    "qwen3": {**GROUPED, "head_dim": 6},
    "gemma2": {**GROUPED, "head_dim": 6, "sliding_window": 3},
    "gemma3_text": {
        **GROUPED,
        "head_dim": 6,
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": GROUPED,
    "olmo2": GROUPED,
    "mixtral": {**GROUPED, "num_local_experts": 4},
    "qwen3_moe": {**GROUPED, "head_dim": 6, "moe_intermediate_size": 20, "num_experts": 4, "num_experts_per_tok": 2},
}
CASES = [(model_type, attention) for model_type in ARCHITECTURES for attention in ("sdpa", "eager")]
# The class has no sdpa: scaled_dot_product_attention cannot cap the scores.
CASES.remove(("gemma2", "sdpa"))
CROSSES_DOCUMENTS = ("opt",)
"""Hands no position ids to the attention mask (transformers 5.23)."""


def tiny_decoder(model_type: str, attention: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **{**SIZES, **ARCHITECTURES[model_type]})
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.eval()


def hidden_states(
    model: PreTrainedModel, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, use_cache: bool = False
) -> torch.Tensor:
    with torch.no_grad():
        output = model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)
    hidden: torch.Tensor = output.last_hidden_state
    return hidden


def packed(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of documents of 5 + 7 and 4 + 8 tokens, and their position ids."""
    input_ids = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(seed))
    lengths = ((5, 7), (4, 8))
    return input_ids, torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])


def changed_first_documents(input_ids: torch.Tensor) -> torch.Tensor:
    changed = input_ids.clone()
    changed[0, :5] = 3 + (changed[0, :5] + 40) % 97
    changed[1, :4] = 3 + (changed[1, :4] + 40) % 97
    return changed


@pytest.mark.parametrize(("model_type", "attention"), [case for case in CASES if case[0] not in CROSSES_DOCUMENTS])
def test_document_mask_block_equals_single_documents(model_type: str, attention: str) -> None:
    model = tiny_decoder(model_type, attention)
    input_ids, position_ids = packed(1)
    found = hidden_states(model, input_ids, position_ids)
    changed = hidden_states(model, changed_first_documents(input_ids), position_ids)
    for row, start in ((0, 5), (1, 4)):
        alone = hidden_states(model, input_ids[row : row + 1, start:])[0]
        torch.testing.assert_close(found[row, start:], alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(changed[row, start:], found[row, start:], rtol=1e-4, atol=1e-5)
        assert (changed[row, :start] - found[row, :start]).abs().max() > 0.1
    check_document_mask(
        lambda ids, positions: hidden_states(model, ids, positions), model_type=model_type, attention=attention
    )


@pytest.mark.parametrize(("model_type", "attention"), CASES)
def test_document_mask_without_position_ids_is_absent(model_type: str, attention: str) -> None:
    model = tiny_decoder(model_type, attention)
    input_ids, _ = packed(1)
    difference = hidden_states(model, changed_first_documents(input_ids)) - hidden_states(model, input_ids)
    assert difference[0, 5:].abs().max() > 0.1 and difference[1, 4:].abs().max() > 0.1
    with pytest.raises(ConfigError, match="lets a document see the one before it"):
        check_document_mask(lambda ids, _: hidden_states(model, ids), model_type=model_type, attention=attention)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_check_document_mask_ignored_by_architecture_raises(attention: str) -> None:
    model = tiny_decoder("opt", attention)
    message = rf"data.document_mask: found true, but opt with {attention} attention lets .*; expected false, another"
    with pytest.raises(ConfigError, match=message):
        check_document_mask(
            lambda ids, positions: hidden_states(model, ids, positions), model_type="opt", attention=attention
        )


def test_document_mask_with_kv_cache_is_ignored() -> None:
    # With a key-value cache transformers does not look at the position ids; it is the default of every decoder.
    model = tiny_decoder("llama", "sdpa")
    with pytest.raises(ConfigError, match="llama with sdpa attention lets a document see"):
        check_document_mask(
            lambda ids, positions: hidden_states(model, ids, positions, use_cache=True),
            model_type="llama",
            attention="sdpa",
        )


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_check_document_mask_tolerates_rounding(model_type: str) -> None:
    model = tiny_decoder(model_type, "sdpa").bfloat16()
    check_document_mask(
        lambda ids, positions: hidden_states(model, ids, positions), model_type=model_type, attention="sdpa"
    )
