"""Encoders with `is_decoder`: attention is causal, and so is the objective, with the logits of transformers."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from das_ds.config import ModelConfig
from das_ds.errors import ConfigError, ModelError
from das_ds.functional.token_sampling import sample_tokens
from das_ds.models.architectures.registry import spec_for
from das_ds.models.generation import DocumentTokens, TokenSampler, continue_rows
from das_ds.models.inspect.describe import inspect_model
from das_ds.models.language_model import LanguageModel
from das_ds.models.loading import find_spec, load_model
from helpers.tiny_models import CONFIGS

CAUSAL_ENCODERS = pytest.mark.parametrize("model_type", ["bert", "roberta", "xlm-roberta", "electra"])
LENGTH = 12


def causal(model_type: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **CONFIGS[model_type], is_decoder=True, initializer_range=0.5)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


@CAUSAL_ENCODERS
def test_causal_encoder_has_the_next_token_losses_of_transformers(model_type: str) -> None:
    model = causal(model_type).double()
    tokens = torch.randint(5, 60, (2, LENGTH))
    before_last = torch.arange(2 * LENGTH).view(2, LENGTH)[:, :-1].flatten()
    targets = tokens[:, 1:].flatten()

    network = LanguageModel(model, spec_for(model_type, is_decoder=True))
    hidden, losses = network(tokens, before_last, targets)
    logits = model(input_ids=tokens).logits.flatten(0, 1)[before_last]
    expected = functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-6)

    later = tokens.clone()
    later[:, 7:] = 60
    other, _ = network(later, before_last, targets)
    torch.testing.assert_close(other[:, :7], hidden[:, :7])
    assert not torch.allclose(other[:, 7:], hidden[:, 7:])


@CAUSAL_ENCODERS
@torch.no_grad()
def test_causal_encoder_generates_like_transformers_without_a_cache(model_type: str) -> None:
    network = LanguageModel(causal(model_type), spec_for(model_type, is_decoder=True))
    allowed = torch.ones(network.model.config.vocab_size, dtype=torch.bool)
    uniforms = torch.rand(3, LENGTH, dtype=torch.float64)
    prompts = torch.randint(5, 60, (3, 4))
    sampler = TokenSampler(allowed, temperature=0.9, top_p=0.95)
    tokens = continue_rows(network, network, prompts, uniforms, sampler, DocumentTokens(2))
    for stop in range(4, LENGTH):
        logits = network.model(tokens[:, :stop], use_cache=False).logits[:, -1].float()
        assert torch.equal(tokens[:, stop], sample_tokens(logits, uniforms[:, stop], temperature=0.9, top_p=0.95)), stop


@CAUSAL_ENCODERS
def test_find_spec_of_an_encoder_follows_is_decoder(tmp_path: Path, model_type: str) -> None:
    for is_decoder, objective in ((True, "clm"), (False, "mlm")):
        values = {"model_type": model_type, **CONFIGS[model_type], "is_decoder": is_decoder}
        AutoConfig.for_model(**values).save_pretrained(tmp_path)
        found = [find_spec(ModelConfig(config=values)), find_spec(ModelConfig(name_or_path=str(tmp_path)))]
        assert [spec.objective for spec in found] == [objective] * 2


def test_inspect_verifies_a_causal_encoder() -> None:
    table = inspect_model(AutoConfig.for_model("bert", **CONFIGS["bert"], is_decoder=True))
    assert table.is_registered and table.spec.objective == "clm" and not any(table.problems.values())


def test_masked_objective_of_a_causal_encoder_is_refused() -> None:
    values = {"model_type": "bert", **CONFIGS["bert"], "is_decoder": True}
    with pytest.raises(ConfigError, match=r"model.objective: found mlm, but bert is made for clm; allowed: auto, clm"):
        find_spec(ModelConfig(config=values, objective="mlm"))


def test_encoder_without_a_causal_class_is_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("deberta-v2", **CONFIGS["deberta-v2"], is_decoder=True).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"type .deberta-v2.: found is_decoder true, but transformers has no causal"):
        load_model(ModelConfig(name_or_path=str(tmp_path)), seed=0, vocab_size=99)
