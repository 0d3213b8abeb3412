"""The process that makes windows ahead: what it makes and removes, and how it ends."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from das_ds.data.stream_windows import TokenStream
from das_ds.data.window_feeder import WindowFeeder
from helpers.streams import SEED, open_shards, stream_tokens, window_tokens, write_shards

T = 50


def wait_for(stream: TokenStream, expected: list[int], *, is_exact: bool = True) -> None:
    deadline = time.monotonic() + 120
    while True:
        folder = stream.spec.folder
        found = sorted(int(path.name) for path in folder.glob("*") if path.is_dir() and path.name.isdigit())
        if found[-len(expected) :] == expected and (len(found) == len(expected) or not is_exact):
            return
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def test_feeder_makes_windows_ahead_and_a_killed_one_is_replaced(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "text")
    stream = open_shards(tmp_path / "text", tmp_path / "cache", T)
    expected = stream_tokens(shards, SEED, "soup-train", 8 * T)
    feeder = WindowFeeder([stream.spec])
    try:
        feeder.advance({stream.spec.name: 0})
        wait_for(stream, [0, 1, 2])
        feeder.advance({stream.spec.name: 3})
        wait_for(stream, [0, 2, 3, 4, 5])
        feeder._process.kill()
        feeder._process.wait()
        # Training goes on alone until it is at the next window.
        assert window_tokens(stream, 6) == expected[6 * T : 7 * T]
        feeder.advance({stream.spec.name: 5})
        wait_for(stream, [0, 4, 5, 6, 7])
    finally:
        feeder.close()
    assert feeder._process.poll() is not None
    for number in (0, 4, 5, 7):
        found = stream.find(number)
        assert found is not None and found.tokens.tolist() == expected[number * T : (number + 1) * T]


def test_feeder_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """Its end of the pipe is closed then, however it ends."""
    write_shards(tmp_path / "text")
    stream = open_shards(tmp_path / "text", tmp_path / "cache", T)
    feeder = WindowFeeder([stream.spec])
    feeder.advance({stream.spec.name: 0})
    feeder._close_pipe()
    assert feeder._process.wait(120) == 0


def test_feeder_leaves_errors_of_text_to_training(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").mkdir()
    path = tmp_path / "text" / "0.jsonl"
    path.write_text('{"text": "noodles"}\n')
    stream = open_shards(tmp_path / "text", tmp_path / "cache", T)
    path.rename(tmp_path / "away.jsonl")
    feeder = WindowFeeder([stream.spec])
    try:
        feeder.advance({stream.spec.name: 0})
        deadline = time.monotonic() + 120
        while not (stream.spec.folder / "lock").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # It goes on as soon as the text can be read.
        (tmp_path / "away.jsonl").rename(path)
        feeder.advance({stream.spec.name: 1})
        # The first one is there too if the text was back before it was read.
        wait_for(stream, [1, 2, 3], is_exact=False)
    finally:
        feeder.close()
    assert "Traceback" not in capfd.readouterr().err
