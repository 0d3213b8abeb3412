"""Probabilities of choices against all logits of one choice at a time."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from das_ds.benchmark.encoding import ChoiceEncoder
from das_ds.benchmark.items import Item
from das_ds.benchmark.log_likelihood import ScoredItems
from das_ds.benchmark.rows import build_causal_rows, build_masked_rows, compose_batches
from das_ds.config import ObjectiveName
from das_ds.errors import DataError, ModelError
from helpers.benchmarks import QUESTIONS, bare_tokenizer, benchmark_of, items_of, plain_log_likelihood, score_alone
from helpers.tiny_models import tiny_model
from helpers.tiny_tokenizer import tiny_tokenizer, word_tokenizer

LONG = {"max_position_embeddings": 80}
ITEMS = [
    *items_of(QUESTIONS),
    # Another context for each choice, as in WinoGrande; white space at the end of a context; two padded lengths.
    Item(("The soup", "The bread"), (" was cold", " was cold"), 1),
    Item(("The price was ", "The price was "), ("fair", "high"), 0),
    Item((" ".join(["warm bread"] * 11),), (" and soup",), 0),
]


def check_against_plain(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, found: ScoredItems) -> None:
    for item, choices in zip(ITEMS, found.items, strict=True):
        for context, continuation, choice in zip(item.contexts, item.continuations, choices, strict=True):
            # White space at the end of a context belongs to the choice.
            stripped = context.rstrip()
            expected = plain_log_likelihood(model, tokenizer, stripped, context[len(stripped) :] + continuation)
            assert choice.log_likelihood == pytest.approx(expected[0], abs=1e-4)
            assert (choice.is_greedy, choice.num_tokens, choice.text) == (*expected[1:], continuation)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "roberta", "bert", "modernbert"])
def test_log_likelihood_equals_plain_computation(model_type: str) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(model_type, vocab_size=len(tokenizer), **LONG)
    check_against_plain(model, tokenizer, score_alone(model, tokenizer, benchmark_of(ITEMS)))


def test_log_likelihood_without_special_tokens_equals_plain_computation() -> None:
    tokenizer = bare_tokenizer()
    model = tiny_model("gpt2", vocab_size=len(tokenizer), n_positions=80)
    check_against_plain(model, tokenizer, score_alone(model, tokenizer, benchmark_of(ITEMS)))


@torch.no_grad()
def test_log_likelihood_greedy_choice_is_found() -> None:
    tokenizer = bare_tokenizer()
    model = tiny_model("gpt2", vocab_size=len(tokenizer), n_positions=80).eval()
    context = "The waiter brought"
    ids = tokenizer(context)["input_ids"]
    start = len(ids)
    # Texts of some tokens are not tokenized as these tokens again.
    for _ in range(3):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    best = tokenizer.decode(ids[start:])
    assert tokenizer(context + best)["input_ids"] == ids
    scored = score_alone(model, tokenizer, benchmark_of([Item((context, context), (best, best + " soup"), 0)]))
    assert [choice.is_greedy for choice in scored.items[0]] == [True, False]


@torch.no_grad()
def test_log_likelihood_without_context_follows_start_token() -> None:
    tokenizer = bare_tokenizer()
    model = tiny_model("gpt2", vocab_size=len(tokenizer), n_positions=80).eval()
    scored = score_alone(model, tokenizer, benchmark_of([Item(("",), ("soup",), 0)]))
    ids = [tokenizer.eos_token_id, *tokenizer("soup")["input_ids"]]
    log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
    expected = sum(float(log_probs[position - 1, ids[position]]) for position in range(1, len(ids)))
    assert scored.items[0][0].log_likelihood == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "bert"])
@torch.no_grad()
def test_log_likelihood_cuts_beginning_of_long_context(model_type: str) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(model_type, vocab_size=len(tokenizer), max_position_embeddings=24)
    words = [f"soup{number}" for number in range(40)]
    item = Item((" ".join(words),) * 2, (" bread", " menu"), 0)
    scored = score_alone(model, tokenizer, benchmark_of([item]))
    assert scored.num_truncated == 2
    ids = tokenizer(" ".join(words) + " bread", add_special_tokens=False)["input_ids"]
    choice = len(ids) - len(tokenizer(" ".join(words), add_special_tokens=False)["input_ids"])
    if model_type == "llama":
        # 24 tokens are read, and the last token of the choice is predicted only.
        ids = [tokenizer.bos_token_id, *ids[-24:]]
        log_probs = model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(dim=-1)
        expected = sum(float(log_probs[len(ids) - 1 - n, ids[-n]]) for n in range(choice, 0, -1))
    else:
        ids = [tokenizer.bos_token_id, *ids[-22:], tokenizer.eos_token_id]
        expected = 0.0
        for position in range(len(ids) - 1 - choice, len(ids) - 1):
            masked = torch.tensor([[*ids[:position], tokenizer.mask_token_id, *ids[position + 1 :]]])
            expected += float(model(masked).logits[0, position].double().log_softmax(dim=0)[ids[position]])
    assert scored.items[0][0].log_likelihood == pytest.approx(expected, abs=1e-4)


def test_log_likelihood_is_the_same_in_any_batch_size() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model("roberta", vocab_size=len(tokenizer), **LONG)
    one, many = (score_alone(model, tokenizer, benchmark_of(ITEMS), batch_size=size) for size in (1, 50))
    for first, second in zip(one.items, many.items, strict=True):
        assert [choice.log_likelihood for choice in first] == pytest.approx(
            [choice.log_likelihood for choice in second], abs=1e-4
        )


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_rows_with_equal_input_are_computed_once(objective: ObjectiveName) -> None:
    tokenizer = word_tokenizer(["Answer", "A", "B", "C"])
    encoder = ChoiceEncoder(tokenizer, objective, 64)
    encoded = list(encoder.encode(["Answer"] * 3, [" A", " B", " C"]))
    rows = build_causal_rows(encoded) if objective == "clm" else build_masked_rows(encoded, tokenizer.mask_token_id)
    assert len(rows) == 1 and rows[0].slots == [0, 1, 2]
    assert rows[0].targets == tokenizer.convert_tokens_to_ids(["A", "B", "C"])


def test_batches_have_few_constant_shapes() -> None:
    tokenizer = tiny_tokenizer()
    encoder = ChoiceEncoder(tokenizer, "clm", 100)
    texts = ["soup " * length for length in range(1, 30)]
    rows = build_causal_rows(list(encoder.encode(texts, [" bread"] * len(texts))))
    batches = compose_batches(rows, 4, 100)
    shapes = [batch.tensors(1, 4).input_ids.shape for batch in batches]
    # The model reads 100 tokens, so that longer rows are not padded to 128.
    assert sorted(set(shapes)) == [(4, 64), (4, 100)] and shapes == sorted(shapes, reverse=True)
    slots = torch.cat([batch.tensors(1, 4).slots for batch in batches])
    assert sorted(slots.tolist()) == list(range(len(slots)))


def test_choice_longer_than_model_raises() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=8)
    with pytest.raises(DataError) as caught:
        score_alone(model, tokenizer, benchmark_of([Item(("soup",), (" bread" * 9,), 0)]))
    assert str(caught.value).startswith("benchmark toy: found ") and str(caught.value).endswith(
        "expected at least one and at most 8, which the model reads"
    )


def test_choice_without_token_raises() -> None:
    tokenizer = word_tokenizer(["soup"])
    model = tiny_model("bert", vocab_size=len(tokenizer.get_vocab()))
    with pytest.raises(DataError, match=r"benchmark toy: found 0 tokens in the choice ' ', expected at least one"):
        score_alone(model, tokenizer, benchmark_of([Item(("soup", "soup"), (" ", " soup"), 0)]))


def test_tokenizer_without_start_token_raises() -> None:
    tokenizer = bare_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="found neither bos_token nor eos_token"):
        list(ChoiceEncoder(tokenizer, "clm", 64).encode([""], ["soup"]))


def test_encoder_without_mask_token_raises() -> None:
    tokenizer = bare_tokenizer()
    with pytest.raises(ModelError, match="found no mask token, by which encoders score choices"):
        score_alone(tiny_model("bert", vocab_size=len(tokenizer)), tokenizer, benchmark_of(ITEMS))


def test_special_tokens_that_change_the_text_raise() -> None:
    tokenizer = tiny_tokenizer()

    class Odd(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, text: str, **options: bool) -> dict[str, list[int]]:
            return {"input_ids": [1, 2] if options else [3]}

    odd = object.__new__(Odd)
    odd.name_or_path = "odd"
    with pytest.raises(ModelError, match=r"tokenizer of odd: found the tokens \[3\] of 'a' with special tokens, and"):
        ChoiceEncoder(odd, "clm", 64)


def test_probability_that_is_not_finite_raises() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), **LONG)
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match="benchmark toy: found a probability that is not finite"):
        score_alone(model, tokenizer, benchmark_of(ITEMS))
