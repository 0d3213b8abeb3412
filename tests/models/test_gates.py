"""Gates against the written-out network, plain autograd and one sequence at a time."""

from __future__ import annotations

import pytest
import torch

from das_ds.models.gates import UnitGate, UnitGates
from das_ds.models.masked_lm import MaskedLanguageModel
from das_ds.models.registry import adapter_for
from helpers.reference import encode, lm_logits
from helpers.tiny_models import NO_DROPOUT, random_importance, tiny_model


@pytest.mark.parametrize("first_row", [0, 2, 5])
@pytest.mark.parametrize("rows_in_gate", ["one", "each"])
def test_unit_gate_equals_plain_autograd(first_row: int, rows_in_gate: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3, 12, requires_grad=True)
    gate = torch.rand(1 if rows_in_gate == "one" else 5 - first_row, 4, requires_grad=True)
    upstream = torch.randn(5, 3, 12)
    y = UnitGate.apply(x, gate, first_row)
    found = torch.autograd.grad(y, (x, gate), upstream)
    full = torch.cat((torch.ones(first_row, 4), gate.expand(5 - first_row, 4)))
    expected_y = x * full.repeat_interleave(3, dim=1)[:, None, :]
    expected = torch.autograd.grad(expected_y, (x, gate), upstream)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(found, expected)


def test_gate_gradient_is_summed_in_float32() -> None:
    torch.manual_seed(0)
    x, dy = torch.randn(2, 500, 6).bfloat16(), torch.randn(2, 500, 6).bfloat16()
    gate = torch.ones(2, 3, requires_grad=True)
    (found,) = torch.autograd.grad(UnitGate.apply(x, gate, 0), gate, dy)
    expected = (x.double() * dy.double()).sum(1).view(2, 3, 2).sum(2)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_gated_rows_equal_the_written_out_network(model_type: str) -> None:
    model = tiny_model(model_type, **NO_DROPOUT)
    adapter = adapter_for(model_type)
    importance = random_importance(model)
    ids = torch.randint(5, 100, (5, 9), generator=torch.Generator().manual_seed(0))
    predicted = torch.tensor([0, 7, 11])
    with UnitGates(model, adapter).active({g: v[:, None] for g, v in importance.items()}, first_row=3):
        hidden, logits = MaskedLanguageModel(model, adapter)(ids, predicted)
    ones = {group: torch.ones_like(values) for group, values in importance.items()}
    plain = encode(model, ids[:3], ones)
    torch.testing.assert_close(hidden[:3], plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hidden[3:], encode(model, ids[3:], importance), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, lm_logits(model, plain.flatten(0, 1)[predicted]), rtol=1e-4, atol=1e-4)


def test_gates_of_one_change_nothing_and_leave_no_hooks() -> None:
    model = tiny_model(**NO_DROPOUT)
    adapter = adapter_for("roberta")
    gates = {g: torch.ones_like(v)[:, None] for g, v in random_importance(model).items()}
    ids = torch.randint(5, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    before = model(ids).logits
    with pytest.raises(RuntimeError, match="on purpose"), UnitGates(model, adapter).active(gates):
        assert torch.equal(model(ids).logits, before)
        raise RuntimeError("on purpose")
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert hooks == 0
