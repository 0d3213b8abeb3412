"""`das-ds train` on real ranks, each a process with an exit code."""

from __future__ import annotations

import itertools
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from transformers import PreTrainedTokenizerBase

from das_ds.checkpoint.manifest import RunState
from das_ds.cli import main
from das_ds.config import RunConfig
from das_ds.config.io import resolved_dict
from das_ds.data.batch import Batch
from das_ds.distributed.collectives import rank
from das_ds.methods.base import Losses, Method
from das_ds.softmask import directions_file, importance_file
from das_ds.tracking.sinks import JsonlSink
from das_ds.training import export
from das_ds.training.save_point import SavePoint
from helpers.run_ranks import start_ranks

T = TypeVar("T")

PATIENCE_S = 120.0


def start_training(
    values: dict[str, Any], folder: Path, world_size: int, disturb: Callable[[], None] | None = None
) -> list[Any]:
    """Processes of `das-ds train` over this config, whose messages to users are in `folder/stderr_<rank>`.

    Args:
        values: config of the run.
        folder: for what the start needs.
        world_size: number of ranks.
        disturb: called on every rank before it begins; importable by name.
    """
    path = folder / "config_of_run.yaml"
    path.write_text(yaml.safe_dump(resolved_dict(RunConfig(**values))), encoding="utf-8")
    return start_ranks(_train, world_size, str(path), str(folder), disturb)


def exit_codes(processes: list[Any]) -> list[int]:
    """Exit codes of all, waited for; none is left behind."""
    try:
        for process in processes:
            process.join(PATIENCE_S)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def wait_until(is_true: Callable[[], bool], what: str) -> None:
    """Returns as soon as it is true."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_true():
        assert time.monotonic() < deadline, f"time ran out; {what} never happened"
        time.sleep(0.02)


def hang_in_step_three_of_rank_one() -> None:
    """For `disturb`: its third micro-step never ends."""

    def hang(step: int) -> None:
        if step == 3 and rank() == 1:
            time.sleep(3600)

    _before_micro_steps(hang)


def take_half_a_second_per_step() -> None:
    """For `disturb`: every rank gives signs of life in the middle of training, however fast the machine is."""
    _before_micro_steps(lambda _: time.sleep(0.5))


def fill_disk_in_step_three() -> None:
    """For `disturb`: from then on the system refuses to write more than a little to any file of rank 1."""
    check = SavePoint.check

    def filled(self: SavePoint, run: RunState, *, save: bool) -> None:
        if run.phase == "train" and run.domain_step == 3 and rank() == 1:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        check(self, run, save=save)

    SavePoint.check = filled  # type: ignore[method-assign]


def fill_disk_of_importance() -> None:
    """For `disturb`: the system refuses to write importance on rank 0."""
    importance_file.save_file = _on_full_disk(importance_file.save_file)
    directions_file._create = _on_full_disk(directions_file._create)


def fill_disk_of_exports() -> None:
    """For `disturb`: the system refuses to write models on rank 0."""
    export._write_file = _on_full_disk(export._write_file, 4096)


def fill_disk_of_tokenizers() -> None:
    """For `disturb`: the system refuses to write tokenizers on rank 0."""
    save = PreTrainedTokenizerBase.save_pretrained
    PreTrainedTokenizerBase.save_pretrained = _on_full_disk(save, 4096)  # type: ignore[method-assign]


def fill_disk_of_metrics() -> None:
    """For `disturb`: the system refuses to write metrics on rank 0."""
    JsonlSink.log = _on_full_disk(JsonlSink.log)  # type: ignore[method-assign]


def _on_full_disk(write: Callable[..., T], num_bytes: int = 64) -> Callable[..., T]:
    """On rank 0 no file may become longer than so many bytes meanwhile; 4096 let configs pass, not weights."""

    def limited(*args: Any, **options: Any) -> T:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank() == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
        try:
            return write(*args, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


def _before_micro_steps(act: Callable[[int], None]) -> None:
    """Have this process do something with the number, counted from 1, of each micro-step of its before it is made."""
    original = Method.losses
    numbers = itertools.count(1)

    @contextmanager
    def disturbed(self: Method, batch: Batch, token_scale: torch.Tensor) -> Iterator[Losses]:
        act(next(numbers))
        with original(self, batch, token_scale) as losses:
            yield losses

    Method.losses = disturbed  # type: ignore[assignment,method-assign]


def _train(config: str, folder: str, disturb: Callable[[], None] | None) -> None:
    log = os.open(f"{folder}/stderr_{os.environ['RANK']}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 2)
    if disturb is not None:
        disturb()
    sys.exit(main(["train", "--config", config]))
