"""Reserved rows: the mean of the known rows, in every parameter with one row per token."""

from __future__ import annotations

import pytest
import torch

from das_ds.models.architectures.registry import ARCHITECTURES, spec_for
from das_ds.models.language_model import LanguageModel
from das_ds.models.vocabulary import (
    Vocabulary,
    mean_init_rows,
    override_vocab_size,
    reserve_embedding_rows,
    vocabulary_parameters,
)
from helpers.tiny_models import tiny_model, without_dropout

BIAS = {"roberta": "lm_head.bias", "bert": "cls.predictions.bias"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_reserve_embedding_rows_are_mean_and_rest_unchanged(model_type: str, tied: bool) -> None:
    model = tiny_model(model_type, tie_word_embeddings=tied)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    names = vocabulary_parameters(model)
    assert len(names) == (2 if tied else 3) and f"{model_type}.embeddings.word_embeddings.weight" in names
    assert BIAS[model_type] in names or BIAS[model_type].replace("bias", "decoder.bias") in names
    reserve_embedding_rows(model, known=90, total=107)
    assert vocabulary_parameters(model) == names
    for name, weight in model.named_parameters():
        if name not in names:
            assert torch.equal(weight, before[name])
            continue
        assert len(weight) == 107 and torch.equal(weight[:90], before[name][:90])
        mean = sum(row.double() for row in before[name][:90]) / 90
        torch.testing.assert_close(weight[90:].double(), mean.expand(weight[90:].shape), rtol=1e-6, atol=1e-7)
    assert spec_for(model_type).layout(model).vocabulary == set(names)
    assert model.get_output_embeddings()(torch.zeros(1, 24)).shape == (1, 107)


def test_reserve_embedding_rows_in_padded_embedding_keeps_size() -> None:
    model = tiny_model()
    weight = model.get_input_embeddings().weight.detach().clone()
    reserve_embedding_rows(model, known=80, total=85)
    found = model.get_input_embeddings().weight
    assert torch.equal(found[:80], weight[:80]) and torch.equal(found[85:], weight[85:])
    assert torch.equal(found[80:85], mean_init_rows(weight, 80, 85)[80:85])


@pytest.mark.parametrize("logits_mib", [0, 64])
@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_reserved_rows_do_not_affect_loss(model_type: str, logits_mib: int) -> None:
    spec = spec_for(model_type)
    small, large = (tiny_model(model_type, **without_dropout(model_type)) for _ in range(2))
    reserve_embedding_rows(large, known=100, total=120)
    ids = torch.randint(5, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    losses = []
    for model, num_rows in ((small, None), (large, 100)):
        network = LanguageModel(model, spec, logits_mib=logits_mib)
        network.num_rows = num_rows
        losses.append(network(ids, torch.arange(18), ids.flatten())[1])
        losses[-1].sum().backward()
    torch.testing.assert_close(losses[0], losses[1])
    for (name, expected), found in zip(small.named_parameters(), large.parameters(), strict=True):
        assert (expected.grad is None) == (found.grad is None)
        if expected.grad is None or found.grad is None:
            continue
        torch.testing.assert_close(found.grad[: len(expected)], expected.grad, rtol=1e-4, atol=1e-6)
        assert name not in vocabulary_parameters(small) or not found.grad[100:].any()


def test_vocabulary_rows_by_corpus_and_exported_size() -> None:
    sizes = Vocabulary(base_rows=104, base_tokens=100, num_tokens={"a": 102, "b": 110, "general": 100})
    assert [sizes.rows(name) for name in ("a", "b", "general")] == [104, 110, 104] and sizes.total == 110
    model = tiny_model()
    with override_vocab_size(model, 77):
        assert model.config.vocab_size == 77
    assert model.config.vocab_size == 100
