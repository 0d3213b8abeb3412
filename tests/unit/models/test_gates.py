"""Unit gates, compared with an explicit network and with autograd per sequence."""

from __future__ import annotations

import pytest
import torch

from das_ds.models.architectures.registry import spec_for
from das_ds.models.gates import UnitGates
from das_ds.models.language_model import LanguageModel
from helpers.reference import encode, lm_logits
from helpers.tiny_models import NO_DROPOUT, random_importance, tiny_model


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_scale_gates_equal_explicit_network(model_type: str) -> None:
    model = tiny_model(model_type, **NO_DROPOUT)
    spec = spec_for(model_type)
    importance = random_importance(model)
    ids = torch.randint(5, 100, (5, 9), generator=torch.Generator().manual_seed(0))
    predicted = torch.tensor([0, 7, 11])
    wrapped = LanguageModel(model, spec)
    with UnitGates(model, spec).active({g: v[:, None] for g, v in importance.items()}, num_rows=5, first_row=3):
        hidden, losses = wrapped(ids, predicted, ids.flatten()[predicted])
    ones = {group: torch.ones_like(values) for group, values in importance.items()}
    plain = encode(model, ids[:3], ones)
    torch.testing.assert_close(hidden[:3], plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hidden[3:], encode(model, ids[3:], importance), rtol=1e-4, atol=1e-5)
    logits = lm_logits(model, plain.flatten(0, 1)[predicted])
    expected = torch.nn.functional.cross_entropy(logits, ids.flatten()[predicted], reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)


def test_scale_gates_of_one_are_identity_and_remove_hooks() -> None:
    model = tiny_model(**NO_DROPOUT)
    spec = spec_for("roberta")
    gates = {g: torch.ones_like(v)[:, None] for g, v in random_importance(model).items()}
    ids = torch.randint(5, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    before = model(ids).logits
    with pytest.raises(RuntimeError, match="on purpose"), UnitGates(model, spec).active(gates, num_rows=2):
        assert torch.equal(model(ids).logits, before)
        raise RuntimeError("on purpose")
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert hooks == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_measure_gates_accumulate_once_and_are_identity(checkpointing: bool) -> None:
    model = tiny_model(**NO_DROPOUT).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    spec = spec_for("roberta")
    ids = torch.randint(5, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    plain = model(ids).logits
    sums = {group: torch.zeros(2, 2, len(values[0])) for group, values in random_importance(model).items()}
    with UnitGates(model, spec).measuring(sums, torch.ones(2)) as anchor:
        logits = model(ids).logits
        assert torch.equal(logits, plain)
        torch.autograd.grad(logits.square().sum(), anchor)
    assert all(parameter.grad is None for parameter in model.parameters())
    for index in range(2):
        gates = {g: torch.ones(2, values.shape[2], requires_grad=True) for g, values in sums.items()}
        alone = lm_logits(model, encode(model, ids[index : index + 1], gates)[0]).square().sum()
        for group, gradient in zip(gates, torch.autograd.grad(alone, list(gates.values())), strict=True):
            torch.testing.assert_close(sums[group][:, index], gradient.abs(), rtol=1e-3, atol=1e-3)
