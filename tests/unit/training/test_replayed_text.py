"""Replayed text of a run, from config to batches, also where domains add tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch

from das_ds.config import RunConfig
from das_ds.data.token_blocks import TokenBlocks
from das_ds.distributed.process_group import RankInfo
from das_ds.training.data_module import DataModule, prepare_data
from das_ds.training.model_card import model_card
from helpers.runs import small_run

INFO = RankInfo(0, 0, 1, torch.device("cpu"))
TOKENS = ["treebanks", "baseline", "weeks"]


def run_text(folder: Path, *, add_tokens: dict[str, Any] | None = None, **replay: Any) -> DataModule:
    values = small_run(folder, method={"name": "replay", "replay": replay}, data={"add_tokens": add_tokens or {}})
    for name in ("food", "papers", "general"):
        # Its name is in every block of a corpus, so that no two have the same.
        (folder / f"{name}.txt").write_text("".join(f"{name} {i} weeks\n" for i in range(99)))
    values["general"] = {"name": "general", "train": values["general"]["valid"]}
    return prepare_data(RunConfig(**values), INFO, "mlm")


def block_rows(text: DataModule, corpus: str) -> set[tuple[int, ...]]:
    blocks = text.blocks[corpus].train
    assert isinstance(blocks, TokenBlocks)
    return set(map(tuple, blocks.index_select(range(len(blocks))).tolist()))


@pytest.mark.parametrize("add_tokens", [{}, {"papers": TOKENS}])
@pytest.mark.parametrize(
    ("domain", "general", "expected"),
    [
        ("food", False, []),
        ("food", True, ["general"]),
        ("papers", False, ["food"]),
        ("papers", True, ["food", "general"]),
    ],
)
def test_training_steps_replay_fraction_of_each_step(
    domain: str, general: bool, expected: list[str], add_tokens: dict[str, Any], tmp_path: Path
) -> None:
    text = run_text(tmp_path, add_tokens=add_tokens, fraction=0.25, general=general)
    assert text.config.replayed(domain) == expected
    stage = next(stage for stage in text.config.stages if stage.name == domain)
    own = block_rows(text, domain)
    others = {name: block_rows(text, name) for name in expected}
    for step in text.training_steps(stage):
        rows = [tuple(row) for batch in step for row in batch.input_ids.tolist()]
        replayed = [row for row in rows if row not in own]
        assert len(replayed) == (2 if expected else 0)
        for name, mine in others.items():
            assert sum(row in mine for row in replayed) == 2 // len(others), name


def test_training_steps_replay_keeps_earlier_tokenizer(tmp_path: Path) -> None:
    text = run_text(tmp_path, add_tokens={"papers": TOKENS}, fraction=0.5)
    own = block_rows(text, "papers")
    batches = [batch for step in text.training_steps(text.config.stages[1]) for batch in step]
    replayed = [tuple(row) not in own for batch in batches for row in batch.input_ids.tolist()]
    largest = torch.cat([batch.corrupted_ids for batch in batches]).max(dim=1).values
    assert largest[torch.tensor(replayed)].max() < 300 <= largest[~torch.tensor(replayed)].max()


def test_model_card_names_replayed_domains(tmp_path: Path) -> None:
    config = run_text(tmp_path, general=True).config
    assert "In the last domain 1 of these are from general." in model_card(config, 1, "mlm")
    assert "In the last domain 1 of these are from food, general." in model_card(config, 2, "mlm")
    assert "In the last domain" not in model_card(RunConfig(**small_run(tmp_path)), 2, "mlm")
