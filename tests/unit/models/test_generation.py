"""Generated rows against the same model called without a cache, token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from das_ds.config import GenerationConfig
from das_ds.errors import ConfigError
from das_ds.functional.token_sampling import document_starts, sample_tokens
from das_ds.models.architectures.registry import spec_for
from das_ds.models.generation import DocumentTokens, TokenSampler, check_prompts, continue_rows, infill_rows
from das_ds.models.language_model import LanguageModel
from helpers.tiny_models import CONFIGS, tiny_model

LENGTH = 12
END = 2
CAUSAL = [name for name in CONFIGS if spec_for(name).objective == "clm"]


def network_of(model_type: str) -> LanguageModel:
    torch.manual_seed(0)
    model = tiny_model(model_type)
    # Wide logits, so that tokens depend on what comes before them.
    for parameter in model.parameters():
        parameter.data.mul_(3.0)
    return LanguageModel(model, spec_for(model_type)).eval()


def sampler_of(network: LanguageModel) -> TokenSampler:
    allowed = torch.ones(network.model.config.vocab_size, dtype=torch.bool)
    allowed[:2] = False
    return TokenSampler(allowed, temperature=0.9, top_p=0.95)


def next_token(network: LanguageModel, rows: Tensor, uniforms: Tensor) -> Tensor:
    """By transformers alone, without a cache."""
    logits = network.model(rows, use_cache=False).logits[:, -1].float()
    logits[:, :2] = -torch.inf
    return sample_tokens(logits, uniforms, temperature=0.9, top_p=0.95)


@pytest.mark.parametrize("model_type", CAUSAL)
@pytest.mark.parametrize("num_given", [1, 4])
@torch.no_grad()
def test_continue_rows_equals_model_without_cache(model_type: str, num_given: int) -> None:
    network = network_of(model_type)
    uniforms = torch.rand(3, LENGTH, dtype=torch.float64)
    prompts = torch.randint(3, network.model.config.vocab_size, (3, num_given))
    tokens = continue_rows(network, network, prompts, uniforms, sampler_of(network), DocumentTokens(END))
    assert torch.equal(tokens[:, :num_given], prompts)
    for stop in range(num_given, LENGTH):
        assert torch.equal(tokens[:, stop], next_token(network, tokens[:, :stop], uniforms[:, stop])), stop


@pytest.mark.parametrize("model_type", CAUSAL)
@pytest.mark.parametrize("prefix", [(), (END,), (3, 4)])
@torch.no_grad()
def test_continue_rows_isolated_documents_read_only_themselves(model_type: str, prefix: tuple[int, ...]) -> None:
    network = network_of(model_type)
    uniforms = torch.rand(4, LENGTH, dtype=torch.float64)
    # Documents end within the prompts.
    prompts = torch.tensor([[END, 5, END, 9], [7, END, 8, 9], [5, 6, 7, END], [7, 8, 9, 10]])
    documents = DocumentTokens(END, prefix)
    tokens = continue_rows(network, network, prompts, uniforms, sampler_of(network), documents, isolated=True)
    starts = document_starts(tokens, END, begins_with_end=documents.begins_with_end)
    assert torch.equal(tokens[:, :4], prompts)
    for row in range(4):
        for stop in range(4, LENGTH):
            begin = int(starts[row, : stop + 1].nonzero().max())
            if begin > 0 and stop - begin < len(prefix):
                assert tokens[row, stop] == prefix[stop - begin], (row, stop)
                continue
            # The first token of a document is drawn given the end of the one before it.
            context = tokens[row : row + 1, min(begin, stop - 1) : stop]
            expected = next_token(network, context, uniforms[row : row + 1, stop])
            assert tokens[row, stop] == expected, (row, stop)


@torch.no_grad()
def test_continue_rows_do_not_depend_on_batch() -> None:
    network = network_of("llama")
    uniforms = torch.rand(5, LENGTH, dtype=torch.float64)
    prompts = torch.full((5, 1), 3)
    documents = DocumentTokens(END, (3,))
    together = continue_rows(network, network, prompts, uniforms, sampler_of(network), documents)
    for row in range(5):
        alone = continue_rows(network, network, prompts[:1], uniforms[row : row + 1], sampler_of(network), documents)
        assert torch.equal(alone[0], together[row])


@torch.no_grad()
def test_infill_rows_sample_every_group_given_all_others() -> None:
    network = network_of("roberta")
    size = network.model.config.vocab_size
    tokens = torch.randint(5, size, (3, LENGTH))
    groups = torch.arange(LENGTH).expand(3, -1) % 4
    groups = groups.masked_fill(torch.arange(LENGTH) == 5, -1)
    uniforms = torch.rand(3, LENGTH, dtype=torch.float64)
    found = infill_rows(network, network, tokens, groups, uniforms, sampler_of(network), num_groups=4, mask_id=4)
    expected = tokens.clone()
    for group in range(4):
        masked = groups == group
        logits = network.model(expected.masked_fill(masked, 4)).logits.float()
        logits[..., :2] = -torch.inf
        for row, column in masked.nonzero().tolist():
            token = sample_tokens(logits[row, column][None], uniforms[row, column][None], temperature=0.9, top_p=0.95)
            expected[row, column] = token[0]
    assert torch.equal(found, expected)
    assert torch.equal(found[:, 5], tokens[:, 5]) and not torch.equal(found, tokens)


def test_token_sampler_fewer_and_more_rows_than_vocabulary() -> None:
    sampler = TokenSampler(torch.tensor([False, True, True]), 1.0, 1.0)
    uniforms = torch.full((1,), 0.999, dtype=torch.float64)
    assert sampler(torch.zeros(1, 5), uniforms).tolist() == [2]
    assert sampler(torch.zeros(1, 2), uniforms).tolist() == [1]
    assert sampler(torch.zeros(0, 5), uniforms[:0]).shape == (0,)


def test_check_prompts_masked_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"prompt_tokens: found 3 with objective mlm.*allowed there: 0"):
        check_prompts(GenerationConfig(prompt_tokens=3), "mlm")
    check_prompts(GenerationConfig(prompt_tokens=3), "clm")
    check_prompts(GenerationConfig(), "mlm")
