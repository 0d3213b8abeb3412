"""Domains with their own lengths, sources and replay, and corpora that are only evaluated, from config to batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from das_ds.checkpoint.manifest import RunState
from das_ds.config import RunConfig
from das_ds.data.blocks import MixedBlocks
from das_ds.distributed.process_group import RankInfo
from das_ds.errors import RunFolderError
from das_ds.training.data_module import DataModule, prepare_data
from das_ds.training.model_card import model_card
from das_ds.training.publish import collect_results
from helpers.mixed_domains import mixed_run


def prepare(values: dict[str, Any], rank: int = 0, world_size: int = 1) -> DataModule:
    return prepare_data(RunConfig(**values), RankInfo(rank, rank, world_size, torch.device("cpu")), "mlm")


def training_rows(text: DataModule, stage: int, first_step: int = 0) -> list[list[tuple[int, ...]]]:
    """Step -> rows as the model sees them."""
    steps = text.training_steps(text.config.stages[stage], first_step)
    return [[tuple(row) for batch in step for row in batch.corrupted_ids.tolist()] for step in steps]


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return mixed_run(tmp_path_factory.mktemp("mixed"), "run")


def test_domains_have_their_lengths(values: dict[str, Any]) -> None:
    """1.5 epochs of all sources of food; 800 tokens of papers, in steps of 128."""
    text = prepare(values)
    num_blocks = text.num_training_blocks("food")
    assert [stage.num_steps for stage in text.config.stages] == [-(-3 * num_blocks // 16), 7]
    assert [len(training_rows(text, stage)) for stage in range(2)] == [-(-3 * num_blocks // 16), 7]
    assert "steps of 8 sequences" in model_card(text.config, 1, "mlm")
    assert f"{-(-3 * num_blocks // 16)}, 7 steps of 8 sequences" in model_card(text.config, 2, "mlm")


def test_batches_are_the_same_on_other_ranks_and_after_a_resume(values: dict[str, Any]) -> None:
    texts = [prepare(values, rank, 2) for rank in range(2)]
    alone = prepare({**values, "train": {**values["train"], "micro_batch_size": 8}})
    for stage in range(2):
        rows = training_rows(alone, stage)
        ranks = [training_rows(text, stage, first_step=2) for text in texts]
        for step, expected in enumerate(rows[2:]):
            micro = values["train"]["micro_batch_size"]
            starts = range(0, 8 // 2, micro)
            assert [row for start in starts for mine in ranks for row in mine[step][start : start + micro]] == expected


def test_only_the_second_domain_replays(values: dict[str, Any]) -> None:
    """A quarter of its sequences, in the proportions of the first domain's sources."""
    text = prepare(values)
    own = text.blocks["papers"].train
    earlier = text.blocks["food"].train
    assert own is not None and isinstance(earlier, MixedBlocks)
    parts = [set(map(tuple, part.index_select(range(len(part))).tolist())) for part in earlier.parts]
    papers = set(map(tuple, own.index_select(range(len(own))).tolist())) - parts[0] - parts[1]
    steps = [
        [tuple(row) for batch in step for row in batch.input_ids.tolist()]
        for step in text.training_steps(text.config.stages[1])
    ]
    assert all(sum(row not in papers for row in step) == 2 for step in steps)
    replayed = [row for step in steps for row in step if row not in papers]
    counts = [sum(row in part for row in replayed) for part in parts]
    assert sum(counts) == 14 and abs(counts[0] - 14 * 0.7) < 2
    assert text.config.own_samples_per_step("food") == 8


def test_source_visits_are_counted(values: dict[str, Any]) -> None:
    text = prepare(values)
    visits = text.source_visits("food", 100)
    assert [count for _, count in visits.values()] == [70, 30] and list(visits) == ["menus", "source1"]
    assert sum(size for size, _ in visits.values()) == text.num_training_blocks("food")
    assert text.source_visits("papers", 100) == {}


def test_evaluated_corpora_are_columns_after_the_general_one(values: dict[str, Any]) -> None:
    text = prepare(values)
    assert list(text.blocks) == ["food", "papers", "general", "law", "code"]
    assert len(text.evaluation_batches("law").indices) > 0 and text.blocks["law"].train is None
    rows = [[5.0, 4.0, 3.0, 2.0, 1.0], [4.0, 4.0, 3.25, 2.5, 0.75]]
    results = collect_results(text.config, RunState(loss_matrix=rows), 1, 2)
    assert results.general_drift == 0.25 and results.drift == {"law": 0.5, "code": -0.25}
    # Also before the text of a run in epochs is read.
    assert collect_results(RunConfig(**values), RunState(loss_matrix=rows), 1, 2) == results


def test_changed_source_is_noticed(values: dict[str, Any], tmp_path: Path) -> None:
    changed = mixed_run(tmp_path, "run")
    before = prepare(changed)
    path = Path(changed["domains"][0]["sources"][1]["train"][0])
    path.write_text(path.read_text() + "and one more line of text\n")
    saved = type("Saved", (), {"metadata": before.fingerprints})()
    with pytest.raises(RunFolderError, match="the text or the tokens of food changed"):
        prepare(changed).load_state_dict(saved)
