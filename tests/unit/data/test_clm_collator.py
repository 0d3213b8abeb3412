"""Causal collator: equal to a loop and to transformers' loss; document boundaries, padding rows."""

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from das_ds.data.batch import Batch
from das_ds.data.objectives import CausalLMCollator, add_document_positions, end_of_text
from das_ds.errors import ModelError
from tests.helpers.tiny_tokenizer import tiny_tokenizer


def random_ids(num_rows: int, length: int) -> Tensor:
    return torch.randint(5, 100, (num_rows, length), generator=torch.Generator().manual_seed(0))


def next_tokens(input_ids: Tensor, num_real: int | None = None) -> Batch:
    numbers = range(len(input_ids) if num_real is None else num_real)
    return CausalLMCollator()(input_ids, numbers, seed=0, stream="s")


def brute_force(input_ids: Tensor, num_real: int, position_ids: Tensor | None = None) -> list[tuple[int, int]]:
    """(flat index, next token) of every prediction, row by row."""
    num_rows, length = input_ids.shape
    return [
        (row * length + s, int(input_ids[row, s + 1]))
        for row in range(min(num_real, num_rows))
        for s in range(length - 1)
        if position_ids is None or position_ids[row, s + 1] != 0
    ]


def predictions(batch: Batch) -> list[tuple[int, int]]:
    return list(zip(batch.predicted.tolist(), batch.targets.tolist(), strict=True))


@pytest.mark.parametrize("num_real", [0, 1, 2, 5])
@pytest.mark.parametrize("length", [1, 2, 7, 16])
def test_causal_collator_predicts_next_tokens(num_real: int, length: int) -> None:
    input_ids = random_ids(5, length)
    batch = next_tokens(input_ids, num_real)
    assert predictions(batch) == brute_force(input_ids, num_real)
    assert batch.num_predicted == num_real * (length - 1)
    assert batch.corrupted_ids is batch.input_ids is input_ids
    assert batch.row_weights.tolist() == [1.0] * num_real + [0.0] * (5 - num_real)
    assert batch.position_ids is None


def test_causal_collator_loss_equals_transformers() -> None:
    config = GPT2Config(vocab_size=100, n_embd=24, n_layer=1, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(config).eval()
    input_ids = random_ids(3, 16)
    batch = next_tokens(input_ids)
    with torch.no_grad():
        expected = model(input_ids=input_ids, labels=input_ids).loss
        logits = model(input_ids=batch.corrupted_ids).logits.flatten(0, 1)[batch.predicted]
    torch.testing.assert_close(functional.cross_entropy(logits, batch.targets), expected)


def test_causal_collator_is_deterministic() -> None:
    input_ids = random_ids(2, 16)
    one = CausalLMCollator()(input_ids, [7, 1], seed=0, stream="s")
    other = CausalLMCollator()(input_ids, [3, 9], seed=1, stream="t")
    assert predictions(one) == predictions(other)


@pytest.mark.parametrize("num_real", [0, 1, 4])
def test_add_document_positions_no_prediction_across_documents(num_real: int) -> None:
    input_ids = random_ids(4, 8)
    position_ids = torch.tensor(
        [
            [0, 1, 2, 3, 4, 5, 6, 7],
            [0, 1, 2, 0, 1, 0, 0, 1],
            [0, 0, 0, 0, 0, 0, 0, 0],
            [0, 1, 2, 3, 4, 5, 6, 0],
        ]
    )
    batch = add_document_positions(next_tokens(input_ids, num_real), position_ids)
    assert predictions(batch) == brute_force(input_ids, num_real, position_ids)
    assert batch.position_ids is position_ids
    assert batch.num_predicted == {0: 0, 1: 7, 4: 7 + 4 + 0 + 6}[num_real]


def test_batch_to_moves_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    position_ids = torch.arange(8).expand(2, -1)
    batch = add_document_positions(next_tokens(random_ids(2, 8)), position_ids)
    batch = replace(batch, replayed_rows=torch.tensor([1]), replayed=torch.arange(7, 14))
    moved = batch.to("meta")
    assert {getattr(moved, f.name).device.type for f in fields(moved)} == {"meta"}
    # Page-locked memory needs an accelerator; the test checks that every tensor is asked for it.
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor + 1)
    for pinned, plain in ((batch.pin_memory(), batch), (next_tokens(random_ids(2, 8)).pin_memory(), None)):
        assert plain is None or all(
            torch.equal(getattr(pinned, f.name), getattr(plain, f.name) + 1) for f in fields(Batch)
        )
        assert (pinned.position_ids is None) == (plain is None)


def test_end_of_text_missing_raises() -> None:
    tokenizer = tiny_tokenizer()
    assert end_of_text(tokenizer) == 2
    tokenizer.eos_token = None
    message = r"has no end-of-text token \(eos_token\); .* \(special tokens found: <s>"
    with pytest.raises(ModelError, match=message):
        end_of_text(tokenizer)
