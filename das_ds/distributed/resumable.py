"""Loops over fixed batches (importance, evaluation) that continue where they were stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

import torch
from tqdm import tqdm

from das_ds.distributed.rng import set_rng_state
from das_ds.distributed.state import ComponentState, SavedComponentState

T = TypeVar("T", covariant=True)


class Batches(Protocol[T]):
    """Batches by number, always the same."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> T: ...


def _nothing() -> None:
    pass


class ResumableLoop(Generic[T]):
    """One loop over batches; what its body keeps from batch to batch lies in `sums`.

    Between two batches, and only there, the run may be saved or stopped. A pass that continues starts at the next batch
    with the sums and random generators that it had; one that was complete gives no batch at all and its sums are whole.

    Args:
        batches: equally many on every rank.
        label: of its progress bar; "" shows none.
        boundary: called between two batches.
    """

    def __init__(self, batches: Batches[T], label: str = "", boundary: Callable[[], None] = _nothing) -> None:
        self._batches, self._label, self._boundary = batches, label, boundary
        self.done = 0
        """Batches that `sums` hold."""
        self.sums: dict[str, torch.Tensor] = {}
        self._generators: dict[str, torch.Tensor] | None = None

    def resume(self, done: int, sums: dict[str, torch.Tensor], generators: dict[str, torch.Tensor]) -> None:
        """Continue after `done` batches."""
        self.done, self.sums, self._generators = done, sums, generators

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[T]:
        if self._generators is not None and self.done < len(self):
            set_rng_state(self._generators)
        numbers = range(self.done, len(self))
        for number in tqdm(
            numbers, self._label, len(self), False, initial=self.done, disable=not self._label, dynamic_ncols=True
        ):
            yield self._batches[number]
            self.done = number + 1
            if self.done < len(self):
                self._boundary()


class ResumableLoops:
    """All passes of one phase of a run, by label; a phase that is done again finds those it had already made.

    Args:
        boundary: called between two batches of any of them; nothing is where nothing is saved.
        show: whether this rank shows progress bars.
    """

    def __init__(self, boundary: Callable[[], None] = _nothing, *, show: bool) -> None:
        self._boundary, self._show = boundary, show
        self._open: dict[str, ResumableLoop[Any]] = {}
        self._saved: dict[str, tuple[int, dict[str, torch.Tensor]]] = {}
        self._generators: dict[str, torch.Tensor] = {}

    def over(self, batches: Batches[T], label: str) -> ResumableLoop[T]:
        """The pass of this label, which continues where a checkpoint left it."""
        started: ResumableLoop[T] = ResumableLoop(batches, label if self._show else "", self._boundary)
        if label in self._saved:
            started.resume(*self._saved.pop(label), self._generators)
        self._open[label] = started
        return started

    def forget(self) -> None:
        """The phase is over."""
        self._open, self._saved = {}, {}

    @property
    def num_batches(self) -> int:
        """Batches done in this phase."""
        return sum(part.done for part in self._open.values())

    def state(self) -> ComponentState:
        """Sums of all passes, this rank's own."""
        parts = [(label, part) for label, part in self._open.items() if part.done]
        sums = {f"{i}/{name}": value for i, (_, part) in enumerate(parts) for name, value in part.sums.items()}
        return ComponentState(local=sums, numbers={"done": [[label, part.done] for label, part in parts]})

    def load(self, saved: SavedComponentState, generators: dict[str, torch.Tensor], device: torch.device) -> None:
        """Continue the passes of a checkpoint; on other ranks or at another stage they start from their beginning.

        Which batch a rank reads depends on the number of ranks, and every sample must count once.
        """
        local = saved.local()
        if not generators:
            return
        self._generators = generators
        for number, (label, done) in enumerate(saved.numbers["done"]):
            begin = f"{number}/"
            sums = {name[len(begin) :]: value.to(device) for name, value in local.items() if name.startswith(begin)}
            self._saved[label] = (done, sums)
