"""Training on streams: the samples of every step, on any ranks and after any resume, and what is on disk meanwhile."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from das_ds.config import RunConfig
from das_ds.config.stage import Stage
from das_ds.data import window_feeder
from das_ds.data.blocks import MixedBlocks
from das_ds.data.stream_blocks import StreamBlocks
from das_ds.data.stream_windows import WINDOWS_AHEAD, TokenStream
from das_ds.distributed.process_group import RankInfo
from das_ds.errors import DataError, RunFolderError
from das_ds.training import stream_feed
from das_ds.training.data_module import DataModule, prepare_data
from helpers.streams import DOCUMENTS, drawn_order, stream_tokens, streamed_run

LENGTH = 16
W = 16
G = 8


class FeederInProcess:
    """Makes windows ahead in the process of the test, at once, so that what is on disk is known."""

    def __init__(self, specs: list[Any]) -> None:
        self._streams = {spec.name: TokenStream(spec) for spec in specs}
        self._previous: dict[str, int] = {}

    def advance(self, windows: dict[str, int]) -> None:
        for name, window in windows.items():
            for number in window_feeder.keep_ahead(self._streams[name], self._previous.get(name, window), window):
                self._streams[name].require(number)
        self._previous = dict(windows)

    def close(self) -> None:
        pass


@pytest.fixture
def values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(stream_feed, "WindowFeeder", FeederInProcess)
    return streamed_run(tmp_path, "run")


def prepare(values: dict[str, Any], rank: int = 0, world_size: int = 1) -> DataModule:
    return prepare_data(RunConfig(**values), RankInfo(rank, rank, world_size, torch.device("cpu")), "mlm")


def read_rows(text: DataModule, stage: Stage, first_step: int = 0) -> Iterator[list[list[int]]]:
    for step in text.training_steps(stage, first_step):
        yield [row for batch in step for row in batch.input_ids.tolist()]


def there(blocks: StreamBlocks) -> list[int]:
    return sorted(int(path.name) for path in blocks.stream.spec.folder.iterdir() if path.is_dir())


def stream_of(text: DataModule, corpus: str) -> StreamBlocks:
    blocks = text.blocks[corpus].train
    assert blocks is not None
    return next(part for part in blocks.parts if isinstance(part, StreamBlocks))


def expected_samples(corpus: str, name: str, stream: str, count: int) -> list[list[int]]:
    """Sample k is block order_w[k mod W] of window w = k div W of all tokens in turn."""
    shards = [*(DOCUMENTS[number::5] for number in range(5)), [f"the {corpus} of twelve weeks"] * 3]
    tokens = stream_tokens(shards, 0, name, -(-count // W) * W * LENGTH)
    blocks = [tokens[start : start + LENGTH] for start in range(0, len(tokens), LENGTH)]
    return [
        blocks[window * W + place] for window in range(-(-count // W)) for place in drawn_order(W, 0, stream, window)
    ][:count]


def test_samples_of_a_streamed_domain_are_those_of_the_closed_form(values: dict[str, Any]) -> None:
    text = prepare(values)
    rows = [row for step in read_rows(text, text.config.stages[0]) for row in step]
    assert rows == expected_samples("food", "food-train", "train/food", 7 * G)


def test_samples_of_a_mixture_are_the_stream_and_the_file_in_proportion(values: dict[str, Any]) -> None:
    text = prepare(values)
    blocks = text.blocks["papers"].train
    assert isinstance(blocks, MixedBlocks)
    rows = [row for step in read_rows(text, text.config.stages[1]) for row in step]
    own = iter(expected_samples("papers", "papers-stream-train", "train/papers/stream", 7 * G))
    file = blocks.parts[1].index_select(range(len(blocks.parts[1]))).tolist()
    head = stream_of(text, "food").index_select(range(W)).tolist()
    streamed = [next(own) for _ in range(32)]
    # 42 of 56 are of the domain, three quarters of them of the stream; the others are of its file, and replayed.
    assert sum(row in streamed for row in rows) >= 31
    in_order = [row for row in rows if row in streamed]
    found = iter(in_order)
    assert all(row in found for row in streamed[:31]), "the order of the stream"
    assert all(row in streamed or row in file or row in head for row in rows)


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_ranks_reads_the_same_samples(values: dict[str, Any], world_size: int) -> None:
    alone = prepare({**values, "train": {**values["train"], "micro_batch_size": 8}})
    texts = [prepare(values, rank, world_size) for rank in range(world_size)]
    for stage in alone.config.stages:
        steps = [list(read_rows(text, stage)) for text in texts]
        for number, expected in enumerate(read_rows(alone, stage)):
            micro_steps = G // (2 * world_size)
            joined = [
                row for micro in range(micro_steps) for mine in steps for row in mine[number][2 * micro : 2 * micro + 2]
            ]
            assert joined == expected


@pytest.mark.parametrize("keeps_cache", [True, False])
def test_resume_at_every_step_reads_the_same_samples(
    values: dict[str, Any], tmp_path: Path, keeps_cache: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the cache is gone, as on another machine, positions come from the checkpoint."""
    text = prepare(values)
    for stage in text.config.stages:
        complete = list(read_rows(text, stage))
        saved: list[dict[str, Any]] = []
        steps = text.training_steps(stage)
        assert text.stream_positions is not None
        for _ in steps:
            saved.append(text.stream_positions.state_dict().metadata)
        for step in range(1, stage.num_steps):
            if not keeps_cache:
                shutil.rmtree(tmp_path / "cache" / "streams")
            again = prepare(values)
            assert again.stream_positions is not None
            again.stream_positions.load_state_dict(type("Saved", (), {"metadata": saved[step - 1]})())  # type: ignore[arg-type]
            assert list(read_rows(again, stage, first_step=step)) == complete[step:]
    assert "read again" not in caplog.text


def test_disk_is_bounded_over_a_stage(values: dict[str, Any]) -> None:
    text = prepare({**values, "domains": [{**values["domains"][0], "steps": 24}, values["domains"][1]]})
    blocks = stream_of(text, "food")
    seen: set[int] = set()
    for _ in read_rows(text, text.config.stages[0]):
        assert len(there(blocks)) <= WINDOWS_AHEAD + 3
        seen.update(there(blocks))
    assert len(seen) >= 24 * G // W
    assert there(blocks) == [0], "at the end only what is measured on and replayed"


def test_samples_to_measure_on_are_of_the_first_window(values: dict[str, Any]) -> None:
    text = prepare(values)
    head = stream_of(text, "food").index_select(range(W)).tolist()
    batches = text.importance_batches("food")
    assert len(batches.indices) == 10
    rows = [row for number in range(len(batches)) for row in batches[number].input_ids.tolist()]
    assert all(row in head for row in rows) and there(stream_of(text, "food")) == [0]
    # More than there are: all of the window.
    assert len(text.importance_batches("food", 10_000).indices) == 10
    large = {**values, "method": {"name": "das", "importance": {"num_samples": 1000}}}
    assert len(prepare(large).importance_batches("food").indices) == W


def test_stream_is_not_read_before_training(values: dict[str, Any], tmp_path: Path) -> None:
    text = prepare(values)
    assert not (tmp_path / "cache" / "streams").exists()
    assert text.num_training_blocks("food") is None and text.num_training_blocks("papers") is None
    assert [size for size, _ in text.source_visits("papers", 40).values()] == [None, 168]


def test_windows_that_a_stage_needs_first_are_made_before_it(values: dict[str, Any], tmp_path: Path) -> None:
    """Step 5 of the mixture begins with sample 40, the 31st of the domain and the 23rd of its stream."""
    general = {**values["general"], "train": [str(tmp_path / "papers-shards" / "*.txt")], "streaming": True}
    text = prepare({**values, "general": general})
    text.require_windows(text.config.stages[1], 5)
    assert [there(stream_of(text, name)) for name in ("food", "papers", "general")] == [[0], [0, 1], [0]]
    alone = prepare({**values, "data": {**values["data"], "cache_dir": str(tmp_path / "other")}})
    alone.require_windows(alone.config.stages[0])
    assert there(stream_of(alone, "food")) == [0] and len(list((tmp_path / "other" / "streams").iterdir())) == 1


def test_changed_stream_is_noticed(values: dict[str, Any], tmp_path: Path) -> None:
    before = prepare(values)
    path = tmp_path / "food-shards" / "0.txt"
    path.write_text(path.read_text() + "and one more line of text\n")
    saved: Any = type("Saved", (), {"metadata": before.fingerprints})()
    with pytest.raises(RunFolderError, match="the text or the tokens of food changed"):
        prepare(values).load_state_dict(saved)


def test_unknown_positions_are_left_out(values: dict[str, Any]) -> None:
    text = prepare(values)
    assert text.stream_positions is not None
    saved: Any = type("Saved", (), {"metadata": {"other": {"window": 3, "epoch": 0}}})()
    text.stream_positions.load_state_dict(saved)
    text.stream_positions.advance({stream_of(text, "food").name: 5})
    assert text.stream_positions.state_dict().metadata == {}, "window 5 was not reached"


def test_bad_text_within_the_stream_ends_training_with_one_line(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "food-shards" / "2.jsonl").write_text('{"text": 1}\n')
    text = prepare(values)
    with pytest.raises(DataError, match=r"^corpus 'food-train': .*2.jsonl, line 1: text column 'text' contains int"):
        list(read_rows(text, text.config.stages[0]))


def test_loader_workers_read_the_same_samples(values: dict[str, Any]) -> None:
    text = prepare(values)
    workers = prepare({**values, "data": {**values["data"], "num_workers": 2}})
    stage = text.config.stages[0]
    assert list(read_rows(workers, stage)) == list(read_rows(text, stage))


def test_document_positions_of_streamed_blocks_restart_at_documents(values: dict[str, Any]) -> None:
    text = prepare(values)
    stream = stream_of(text, "food").stream
    blocks = StreamBlocks(stream, LENGTH, document_mask=True)
    indices = [3, W + 5, 2 * W, 1]
    rows = blocks.index_select(indices)
    positions = blocks.positions(indices)
    assert positions is not None and StreamBlocks(stream, LENGTH).positions(indices) is None
    for row, found in zip(rows.tolist(), positions.tolist(), strict=True):
        # <s> is at the beginning of every document and nowhere else.
        starts = [place for place, token in enumerate(row) if token == 0]
        assert found == [
            place - max([start for start in starts if start <= place], default=0) for place in range(LENGTH)
        ]


def test_window_removed_while_it_is_read_is_made_again(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = stream_of(prepare(values), "food")
    expected = blocks.index_select([2]).tolist()
    require = TokenStream.require
    removals = 2

    def removing(self: TokenStream, window: int) -> Any:
        nonlocal removals
        found = require(self, window)
        if removals:
            removals -= 1
            self.remove([window])
        return found

    monkeypatch.setattr(TokenStream, "require", removing)
    fresh = StreamBlocks(blocks.stream, LENGTH)
    assert fresh.index_select([2]).tolist() == expected and removals == 0
