"""MLM collator: fractions of the three treatments, determinism, special tokens, padding rows."""

from dataclasses import fields

import pytest
import torch

from das_ds.data.batch import Batch
from das_ds.data.objectives import MLMCollator
from das_ds.errors import ModelError
from tests.helpers.tiny_tokenizer import tiny_tokenizer, word_tokenizer

MASKER = MLMCollator.from_tokenizer(tiny_tokenizer(), 0.15)


def random_ids(num_rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 300, (num_rows, length), generator=torch.Generator().manual_seed(0))


def test_mlm_collator_from_tokenizer() -> None:
    assert (MASKER.mask_id, MASKER.vocab_size, sorted(MASKER.special_ids)) == (4, 300, [0, 1, 2, 3, 4])


def test_mlm_collator_treatment_fractions() -> None:
    input_ids = random_ids(400, 500)
    batch = MASKER(input_ids, range(400), seed=0, stream="s")
    ordinary = (input_ids >= 5).sum().item()
    corrupted = batch.corrupted_ids.flatten()[batch.predicted]
    masked = corrupted == MASKER.mask_id
    kept = corrupted == batch.targets
    replaced = ~masked & ~kept
    # Binomial counts; a replacement equals the token it replaces in 1 of 295 cases.
    num = batch.num_predicted
    assert abs(num / ordinary - 0.15) < 5 * (0.15 * 0.85 / ordinary) ** 0.5
    for found, share in ((masked, 0.8), (replaced, 0.1 * 294 / 295), (kept, 0.1 + 0.1 / 295)):
        assert abs(found.float().mean().item() - share) < 5 * (share * (1 - share) / num) ** 0.5
    assert corrupted[replaced].unique().tolist() == list(range(5, 300))


def test_mlm_collator_corrupts_predicted_tokens_only() -> None:
    input_ids = random_ids(64, 64)
    batch = MASKER(input_ids, range(64), seed=0, stream="s")
    changed = (batch.corrupted_ids != input_ids).flatten().nonzero().squeeze(1)
    assert set(changed.tolist()) <= set(batch.predicted.tolist())
    assert torch.equal(batch.targets, input_ids.flatten()[batch.predicted])
    assert batch.targets.min() >= 5
    assert torch.equal(batch.input_ids, input_ids)


def test_mlm_collator_row_depends_on_sample_number_only() -> None:
    input_ids = random_ids(1, 64).expand(3, -1)
    together = MASKER(input_ids, [7, 8, 7], seed=0, stream="s").corrupted_ids
    alone = MASKER(input_ids[:1], [8], seed=0, stream="s").corrupted_ids
    assert torch.equal(together[0], together[2])
    assert torch.equal(together[1], alone[0])
    for seed, stream in ((1, "s"), (0, "t")):
        assert not torch.equal(MASKER(input_ids[:1], [8], seed=seed, stream=stream).corrupted_ids, alone)


def test_mlm_collator_padding_rows_predict_nothing() -> None:
    input_ids = random_ids(5, 64)
    batch = MASKER(input_ids, [3, 1], seed=0, stream="s")
    assert batch.row_weights.tolist() == [1, 1, 0, 0, 0]
    assert batch.predicted.max() < 2 * 64
    assert torch.equal(batch.corrupted_ids[2:], input_ids[2:])


def test_batch_to_moves_all_tensors() -> None:
    batch = MASKER(random_ids(2, 64), [0, 1], seed=0, stream="s")
    moved = batch.to("meta")
    assert isinstance(moved, Batch)
    optional = {"position_ids", "replayed_rows", "replayed"}
    tensors = [f.name for f in fields(Batch) if f.name not in optional]
    assert {getattr(moved, name).device.type for name in tensors} == {"meta"}
    assert all(getattr(moved, name) is getattr(batch, name) is None for name in optional)
    assert moved.num_predicted == batch.num_predicted == len(batch.predicted)
    expected = [torch.long, torch.long, torch.long, torch.long, torch.float32]
    assert [getattr(batch, name).dtype for name in tensors] == expected


def test_mlm_collator_without_mask_token_raises() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(ModelError, match=r"has no mask token; .*\(special tokens found: <s>"):
        MLMCollator.from_tokenizer(tokenizer, 0.15)


def test_mlm_collator_never_uses_id_holes() -> None:
    masker = MLMCollator.from_tokenizer(word_tokenizer([f"word{n}" for n in range(30)], skipped=7), 0.5)
    assert masker.vocab_size == 42 and masker.holes == tuple(range(5, 12))
    input_ids = torch.randint(12, 42, (200, 100), generator=torch.Generator().manual_seed(0))
    corrupted = masker(input_ids, range(200), seed=0, stream="s").corrupted_ids
    assert set(corrupted.unique().tolist()) == {masker.mask_id, *range(12, 42)}
