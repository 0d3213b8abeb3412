"""Weighted losses and distillation through a whole model, masked and causal, against the logits of the model itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional

from das_ds.functional.losses import top_k_entropy
from das_ds.models.architectures.registry import spec_for
from das_ds.models.language_model import LanguageModel
from das_ds.models.lm_loss import Distillation
from helpers.tiny_models import tiny_model, without_dropout

ROWS = 3
LENGTH = 8
# With tied and untied heads, with layers before the projection, and with capped logits.
MODEL_TYPES = ("roberta", "gpt2", "gemma2")
NUM_ROWS = 90
TAUGHT = [1, 4, 5, 11]


def entropy_weight(logits: torch.Tensor) -> torch.Tensor:
    return top_k_entropy(logits, 6)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_language_model_weighs_and_distills_like_plain_torch(model_type: str) -> None:
    model = tiny_model(model_type, **without_dropout(model_type)).double()
    network = LanguageModel(model, spec_for(model_type))
    network.num_rows = NUM_ROWS
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(5, NUM_ROWS, (ROWS, LENGTH), generator=generator)
    predicted = torch.randperm(ROWS * LENGTH, generator=generator)[:14].sort().values
    targets = torch.randint(5, NUM_ROWS, (14,), generator=generator)
    taught = torch.tensor(TAUGHT)

    earlier = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in earlier.parameters():
            parameter.mul_(1.1)
        teacher = LanguageModel(earlier, spec_for(model_type))
        teacher.num_rows = NUM_ROWS
        with teacher.capturing_logits() as captured:
            _, losses = teacher(input_ids, predicted[taught], targets[taught])
        assert losses.tolist() == [0.0] * len(TAUGHT) and len(captured) == 1
        answers = earlier(input_ids=input_ids).logits.flatten(0, 1)[predicted[taught], :NUM_ROWS]

    logits = model(input_ids=input_ids).logits.flatten(0, 1)[predicted, :NUM_ROWS]
    expected = functional.cross_entropy(logits, targets, reduction="none") * entropy_weight(logits).detach()
    _, weighted = network(input_ids, predicted, targets, None, entropy_weight)
    torch.testing.assert_close(weighted, expected, rtol=1e-9, atol=1e-9)

    distillation = Distillation(taught, captured[0])
    with network.distilling(distillation):
        _, losses = network(input_ids, predicted, targets, None, entropy_weight)
    of_tokens = expected.index_fill(0, taught, 0.0)
    of_teacher = functional.kl_div(
        logits[taught].log_softmax(dim=1), answers.log_softmax(dim=1), reduction="none", log_target=True
    ).sum(dim=1)
    assert distillation.divergences is not None
    torch.testing.assert_close(losses, of_tokens, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(distillation.divergences, of_teacher, rtol=1e-8, atol=1e-8)

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found, reference = (
        torch.autograd.grad(tokens.sum() + 2.0 * divergences.sum(), parameters, allow_unused=True)
        for tokens, divergences in ((losses, distillation.divergences), (of_tokens, of_teacher))
    )
    for value, gradient in zip(found, reference, strict=True):
        assert (value is None) == (gradient is None)
        if value is not None:
            torch.testing.assert_close(value, gradient, rtol=1e-6, atol=1e-8)

    # Outside of the contexts calls are ordinary again.
    _, losses = network(input_ids, predicted, targets)
    torch.testing.assert_close(losses, functional.cross_entropy(logits, targets, reduction="none"))
