"""A process group of one rank, without a process group of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from das_ds.distributed.process_group import RankInfo


class SingleRank:
    """What code that runs on all ranks needs of a `ProcessGroup`."""

    info = RankInfo(0, 0, 1, torch.device("cpu"))

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value]

    def main_process_first(self, prepare: Callable[[], Any]) -> Any:
        return prepare()

    def run_on_main(self, do: Callable[[], Any]) -> Any:
        return do()

    def raise_on_all_ranks(self, failure: Exception | None) -> None:
        if failure is not None:
            raise failure
