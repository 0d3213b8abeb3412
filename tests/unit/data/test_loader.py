"""Data loader: global batches do not depend on ranks or workers; resuming needs only the step."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from das_ds.data.batch import Batch
from das_ds.data.loader import AccumulatedBatches, EvaluationBatches, SampleDataset, evaluation_batches, training_steps
from das_ds.data.mixture import SingleDomain
from das_ds.data.objectives import CausalLMCollator, Collator, MLMCollator
from das_ds.data.token_blocks import TokenBlocks
from das_ds.data.token_file import TokenCorpus, TokenFile
from das_ds.errors import ConfigError

LENGTH = 32
NUM_BLOCKS = 21
GLOBAL_BATCH = 8
MASKER = MLMCollator(mask_id=4, special_ids=(0, 1, 2, 3, 4), vocab_size=300, probability=0.3)


@pytest.fixture
def blocks(tmp_path: Path) -> TokenBlocks:
    """All tokens of block i are 5 + i, so that rows identify their block."""
    path = tmp_path / "tokens.bin"
    np.repeat(np.arange(5, 5 + NUM_BLOCKS), LENGTH).astype("<u2").tofile(path)
    return TokenBlocks(TokenCorpus("text", (TokenFile(path, "<u2", NUM_BLOCKS * LENGTH, 1),)), LENGTH)


@pytest.fixture
def documents(tmp_path: Path) -> TokenBlocks:
    """Blocks of documents of 1 to 50 tokens, with document mask."""
    lengths = np.random.default_rng(0).integers(1, 50, 60)
    tokens = np.random.default_rng(1).integers(5, 300, lengths.sum())
    token_file = TokenFile(tmp_path / "tokens.bin", "<u2", len(tokens), len(lengths))
    tokens.astype("<u2").tofile(token_file.path)
    (np.cumsum(lengths) - lengths).astype("<u8").tofile(token_file.starts_path)
    return TokenBlocks(TokenCorpus("text", (token_file,)), LENGTH, document_mask=True)


def steps(
    blocks: TokenBlocks,
    *,
    collator: Collator = MASKER,
    rank: int = 0,
    world_size: int = 1,
    micro_batch_size: int = 4,
    first_step: int = 0,
    num_workers: int = 0,
    seed: int = 0,
) -> list[list[Batch]]:
    return list(
        training_steps(
            SingleDomain(SampleDataset(blocks, collator, seed, "train/soup"), GLOBAL_BATCH),
            first_step=first_step,
            num_steps=7,
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
        )
    )


def evaluation(
    blocks: TokenBlocks,
    *,
    collator: Collator = MASKER,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 4,
    max_sequences: int | None = None,
    indices: list[int] | None = None,
) -> EvaluationBatches:
    return evaluation_batches(
        blocks,
        collator,
        seed=0,
        stream="evaluation/soup",
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        max_sequences=max_sequences,
        indices=indices,
    )


def block_numbers(batch: Batch) -> list[int]:
    assert (batch.input_ids == batch.input_ids[:, :1]).all()
    return (batch.input_ids[:, 0] - 5).tolist()


def assert_same(left: Batch, right: Batch) -> None:
    for field in fields(Batch):
        one = getattr(left, field.name)
        other = getattr(right, field.name)
        assert one is other is None or torch.equal(one, other), field.name


def joined(parts: list[Batch]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, corrupted rows and predicted positions of the batches of all ranks, in the order of the ranks."""
    offsets = np.cumsum([0] + [part.input_ids.numel() for part in parts[:-1]]).tolist()
    predicted = [part.predicted + offset for part, offset in zip(parts, offsets, strict=True)]
    return (
        torch.cat([part.input_ids for part in parts]),
        torch.cat([part.corrupted_ids for part in parts]),
        torch.cat(predicted),
    )


def test_training_steps_shapes(blocks: TokenBlocks) -> None:
    loaded = steps(blocks, micro_batch_size=2)
    assert [len(step) for step in loaded] == [4] * 7
    assert all(batch.row_weights.tolist() == [1, 1] for step in loaded for batch in step)


@pytest.mark.parametrize("world_size", [2, 4])
def test_training_steps_independent_of_ranks(blocks: TokenBlocks, world_size: int) -> None:
    one = steps(blocks, micro_batch_size=4)
    ranks = [steps(blocks, rank=r, world_size=world_size, micro_batch_size=4 // world_size) for r in range(world_size)]
    for number, step in enumerate(one):
        for losses, full in enumerate(step):
            parts = joined([rank[number][losses] for rank in ranks])
            for found, expected in zip(parts, joined([full]), strict=True):
                assert torch.equal(found, expected)


def test_training_steps_epoch_visits_each_block_once(blocks: TokenBlocks) -> None:
    order = [number for step in steps(blocks) for batch in step for number in block_numbers(batch)]
    first = order[:NUM_BLOCKS]
    second = order[NUM_BLOCKS : 2 * NUM_BLOCKS]
    assert sorted(first) == sorted(second) == list(range(NUM_BLOCKS))
    assert first != second != sorted(second)


def test_training_steps_new_corruption_per_epoch(blocks: TokenBlocks) -> None:
    batches = [batch for step in steps(blocks) for batch in step]
    corruptions = [
        tuple((row != 5).nonzero().flatten().tolist())
        for batch in batches
        for number, row in zip(block_numbers(batch), batch.corrupted_ids, strict=True)
        if number == 0
    ]
    assert len(set(corruptions)) == len(corruptions) > 1


@pytest.mark.parametrize("first_step", [1, 3, 7])
def test_training_steps_resumed_equal_tail(blocks: TokenBlocks, first_step: int) -> None:
    tail = steps(blocks)[first_step:]
    resumed = steps(blocks, first_step=first_step)
    assert len(resumed) == len(tail)
    for left, right in zip(resumed, tail, strict=True):
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)


def test_training_steps_workers_load_same_batches(blocks: TokenBlocks) -> None:
    for left, right in zip(steps(blocks, num_workers=2), steps(blocks), strict=True):
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)


def test_training_steps_seed_changes_order(blocks: TokenBlocks) -> None:
    assert block_numbers(steps(blocks)[0][0]) != block_numbers(steps(blocks, seed=1)[0][0])


def test_training_steps_leave_global_rng_unchanged(blocks: TokenBlocks) -> None:
    torch_state = torch.get_rng_state()
    numpy_state = np.random.get_state(legacy=False)["state"]["key"]
    steps(blocks)
    list(evaluation(blocks))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state(legacy=False)["state"]["key"], numpy_state)


def test_training_steps_indivisible_global_batch_raises(blocks: TokenBlocks) -> None:
    message = r"train.global_batch_size is 8; expected a multiple of 9 = 3 ranks x train.micro_batch_size 3"
    with pytest.raises(ConfigError, match=message):
        steps(blocks, world_size=3, micro_batch_size=3)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("max_sequences", [None, 1, 5, 100])
def test_evaluation_batches_independent_of_ranks(
    blocks: TokenBlocks, world_size: int, max_sequences: int | None
) -> None:
    num_sequences = min(max_sequences or NUM_BLOCKS, NUM_BLOCKS)
    ranks = [evaluation(blocks, rank=r, world_size=world_size, max_sequences=max_sequences) for r in range(world_size)]
    found: dict[int, tuple[list[int], torch.Tensor]] = {}
    for batches in ranks:
        for batch in batches:
            real = batch.row_weights.bool()
            rows = batch.predicted // LENGTH
            assert real[rows].all()
            for row in real.nonzero().flatten().tolist():
                number = block_numbers(batch)[row]
                assert number not in found
                found[number] = (batch.corrupted_ids[row].tolist(), batch.predicted[rows == row] - row * LENGTH)
    assert sorted(found) == list(range(num_sequences))
    for number, (corrupted, positions) in found.items():
        alone = MASKER(blocks.index_select([number]), [number], seed=0, stream="evaluation/soup")
        assert corrupted == alone.corrupted_ids[0].tolist()
        assert torch.equal(positions, alone.predicted)


@pytest.mark.parametrize("num_sequences", [1, 4, 5, 9, 21])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_batches_equal_counts_and_sizes(blocks: TokenBlocks, world_size: int, num_sequences: int) -> None:
    shapes = [
        [
            batch.input_ids.shape
            for batch in evaluation(blocks, rank=r, world_size=world_size, max_sequences=num_sequences)
        ]
        for r in range(world_size)
    ]
    assert all(shape == shapes[0] for shape in shapes)
    assert len(set(shapes[0])) == 1
    assert shapes[0][0][0] <= 4
    assert len(shapes[0]) == len(evaluation(blocks, world_size=world_size, max_sequences=num_sequences))


def test_evaluation_batches_are_deterministic(blocks: TokenBlocks) -> None:
    batches = evaluation(blocks)
    for left, right in zip(batches, batches, strict=True):
        assert_same(left, right)


def test_evaluation_batches_of_indices(blocks: TokenBlocks) -> None:
    chosen = [20, 3, 11, 4, 0]
    batches = list(evaluation(blocks, indices=chosen, batch_size=3))
    numbers = [n for b in batches for n, w in zip(block_numbers(b), b.row_weights, strict=True) if w]
    assert numbers == chosen


@pytest.mark.parametrize("num_chosen", [1, 7, 8, 17])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_accumulated_batches_independent_of_ranks(blocks: TokenBlocks, world_size: int, num_chosen: int) -> None:
    chosen = list(range(NUM_BLOCKS))[::-1][:num_chosen]
    samples = SampleDataset(blocks, MASKER, 0, "importance/soup")
    ranks = [AccumulatedBatches(samples, chosen, GLOBAL_BATCH, 2, rank, world_size) for rank in range(world_size)]
    found: list[list[int]] = []
    for step in zip(*ranks, strict=True):
        assert all(len(batches) == GLOBAL_BATCH // (2 * world_size) for batches in step)
        assert all(len(batch.input_ids) == 2 for batches in step for batch in batches)
        joined = [batch for losses in zip(*step, strict=True) for batch in losses]
        found.append([n for b in joined for n, w in zip(block_numbers(b), b.row_weights, strict=True) if w])
    assert found == [chosen[i : i + GLOBAL_BATCH] for i in range(0, num_chosen, GLOBAL_BATCH)]
    assert len(ranks[0]) == len(found)


def causal_predictions(batches: list[Batch]) -> list[tuple[tuple[int, ...], tuple[int, ...], list[tuple[int, int]]]]:
    """Real rows with their positions and predictions (place, token), in the order of the batches."""
    rows = []
    for batch in batches:
        assert batch.position_ids is not None
        assert batch.row_weights[batch.predicted // LENGTH].all()
        pairs = list(zip(batch.predicted.tolist(), batch.targets.tolist(), strict=True))
        for row in batch.row_weights.nonzero().flatten().tolist():
            mine = [(place - row * LENGTH, token) for place, token in pairs if place // LENGTH == row]
            rows.append((tuple(batch.input_ids[row].tolist()), tuple(batch.position_ids[row].tolist()), mine))
    return rows


@pytest.mark.parametrize("world_size", [2, 4])
def test_training_steps_causal_independent_of_ranks(documents: TokenBlocks, world_size: int) -> None:
    def of(rank: int, ranks: int) -> list[list[Batch]]:
        return steps(
            documents,
            collator=CausalLMCollator(),
            rank=rank,
            world_size=ranks,
            micro_batch_size=GLOBAL_BATCH // 2 // ranks,
        )

    ranks = [of(rank, world_size) for rank in range(world_size)]
    for number, step in enumerate(of(0, 1)):
        for losses, full in enumerate(step):
            parts = [rank[number][losses] for rank in ranks]
            assert causal_predictions(parts) == causal_predictions([full])


@pytest.mark.parametrize("first_step", [1, 4])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_steps_causal_resumed_with_workers(documents: TokenBlocks, first_step: int, num_workers: int) -> None:
    tail = steps(documents, collator=CausalLMCollator())[first_step:]
    resumed = steps(documents, collator=CausalLMCollator(), first_step=first_step, num_workers=num_workers)
    for left, right in zip(resumed, tail, strict=True):
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_batches_causal_predict_within_documents(documents: TokenBlocks, world_size: int) -> None:
    found = [
        row
        for rank in range(world_size)
        for row in causal_predictions(
            list(evaluation(documents, collator=CausalLMCollator(), rank=rank, world_size=world_size))
        )
    ]
    positions = documents.positions(range(len(documents)))
    assert positions is not None
    expected = [
        (
            tuple(ids),
            tuple(places),
            [(s, ids[s + 1]) for s in range(LENGTH - 1) if places[s + 1] == places[s] + 1],
        )
        for ids, places in zip(documents.index_select(range(len(documents))).tolist(), positions.tolist(), strict=True)
    ]
    assert sorted(found) == sorted(expected)


def test_evaluation_batches_causal_padding_rows_predict_nothing(documents: TokenBlocks) -> None:
    samples = SampleDataset(documents, CausalLMCollator(), 0, "evaluation/soup")
    batch = samples.fixed_batch([], 3, 0)
    assert batch.num_predicted == 0
    assert batch.position_ids is not None and batch.position_ids.shape == (3, LENGTH)
