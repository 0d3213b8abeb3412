"""Runs on streams, complete and interrupted, with and without what the cache has of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from das_ds.config import RunConfig
from das_ds.data.stream_windows import WINDOWS_AHEAD
from das_ds.distributed.process_group import init_process_group
from das_ds.training.train import train
from helpers.resume import Place, break_off_at
from helpers.streams import streamed_run


def streamed_runs(folder: Path, stage: int, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """The same run in several folders, each with a cache of its own; it may be saved at every step."""
    return [
        streamed_run(
            folder,
            name,
            data={"cache_dir": str(folder / f"cache-{name}")},
            checkpoint={"interval": 1, "async_save": False},
            deepspeed={"zero_optimization": {"stage": stage}},
            evaluation={"max_sequences": 4},
            seed=3,
        )
        for name in names
    ]


def complete_and_without_cache(complete: dict[str, Any], broken: dict[str, Any], place: Place) -> None:
    """Both runs; the second is interrupted at a place, after which its streams are not in the cache any more."""
    ranks = init_process_group()
    train(RunConfig(**complete), ranks)
    assert break_off_at(broken, place)
    ranks.run_on_main(lambda: shutil.rmtree(Path(broken["data"]["cache_dir"]) / "streams"))
    train(RunConfig(**broken), ranks)


def check_windows_on_disk(cache: Path) -> None:
    """A run that has ended has left the first window of each stream, on which it measured, and nothing unfinished."""
    folders = list((cache / "streams").iterdir())
    assert len(folders) == 2
    for folder in folders:
        windows = sorted(int(path.name) for path in folder.iterdir() if path.is_dir() and path.name.isdigit())
        assert windows[0] == 0 and len(windows) <= WINDOWS_AHEAD + 3
        assert not list(folder.glob(".partial-*"))
