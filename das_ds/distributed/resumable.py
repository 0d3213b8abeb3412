"""Resumable loops over fixed batches (importance, evaluation): they continue where a checkpoint was saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

import torch

from das_ds.distributed.rng import get_rng_state, set_rng_state
from das_ds.distributed.state import ComponentState, SavedComponentState
from das_ds.progress import Progress

T = TypeVar("T", covariant=True)

RNG = "rng/"
"""Beginning of the names of the random generators' states; those of accumulators begin with a number."""


class Batches(Protocol[T]):
    """Batches by index, the same at every start."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> T: ...


def _no_op() -> None:
    pass


class ResumableLoop(Generic[T]):
    """One loop over batches, whose body keeps its running sums in `accumulators`.

    The run may be saved or stopped between two batches, and only there. A resumed loop starts at the next batch with
    the accumulators and random generators of the checkpoint; a loop that was complete yields no batch, and its
    accumulators hold the final sums.

    Args:
        batches: equally many on every rank.
        label: of its progress bar; "" shows none.
        on_batch_end: called between two batches.
    """

    def __init__(self, batches: Batches[T], label: str = "", on_batch_end: Callable[[], None] = _no_op) -> None:
        self._batches = batches
        self._label = label
        self._on_batch_end = on_batch_end
        self.num_done = 0
        """Batches that the accumulators include."""
        self.accumulators: dict[str, torch.Tensor] = {}
        self._rng_state: dict[str, torch.Tensor] | None = None

    def resume(self, num_done: int, accumulators: dict[str, torch.Tensor], rng_state: dict[str, torch.Tensor]) -> None:
        """Continue after `num_done` batches."""
        self.num_done = num_done
        self.accumulators = accumulators
        self._rng_state = rng_state

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[T]:
        if self._rng_state is not None and self.num_done < len(self):
            set_rng_state(self._rng_state)
        indices = Progress(
            range(self.num_done, len(self)),
            self._label,
            len(self),
            initial=self.num_done,
            unit="batches",
            leave=False,
        )
        for index in indices:
            yield self._batches[index]
            # The body has added this batch to the accumulators: only now may a checkpoint count it.
            self.num_done = index + 1
            if self.num_done < len(self):
                self._on_batch_end()


class ResumableLoops:
    """All loops of one phase of a run, by label; a phase that runs again finds the loops it had already made.

    Args:
        on_batch_end: called between two batches of any loop; a no-op where nothing is saved.
        show_progress: whether this rank shows progress bars.
        device: where accumulators are restored to.
    """

    def __init__(
        self,
        on_batch_end: Callable[[], None] = _no_op,
        *,
        show_progress: bool,
        device: torch.device | str = "cpu",
    ) -> None:
        self._on_batch_end = on_batch_end
        self._show_progress = show_progress
        self._device = device
        self._loops: dict[str, ResumableLoop[Any]] = {}
        self._saved: dict[str, tuple[int, dict[str, torch.Tensor]]] = {}
        self._rng_state: dict[str, torch.Tensor] = {}

    def start(self, batches: Batches[T], label: str) -> ResumableLoop[T]:
        """The loop of this label, resumed where a checkpoint left it."""
        loop: ResumableLoop[T] = ResumableLoop(batches, label if self._show_progress else "", self._on_batch_end)
        if label in self._saved:
            loop.resume(*self._saved.pop(label), self._rng_state)
        self._loops[label] = loop
        return loop

    def reset(self) -> None:
        """Forget all loops: the phase is over."""
        self._loops = {}
        self._saved = {}

    @property
    def num_batches(self) -> int:
        """Batches done in this phase."""
        return sum(loop.num_done for loop in self._loops.values())

    def state_dict(self) -> ComponentState:
        """Accumulators of all loops, and the random generators; this rank's own."""
        started = [(label, loop) for label, loop in self._loops.items() if loop.num_done]
        if not started:
            return ComponentState(metadata={"done": []})
        # Taken between two batches, so this is the state with which the next batch begins.
        tensors = {f"{RNG}{name}": value for name, value in get_rng_state().items()}
        for number, (_, loop) in enumerate(started):
            tensors |= {f"{number}/{name}": value for name, value in loop.accumulators.items()}
        return ComponentState(
            rank_local=tensors, metadata={"done": [[label, loop.num_done] for label, loop in started]}
        )

    def load_state_dict(self, saved: SavedComponentState) -> None:
        """Resume the loops of a checkpoint; with another world size or ZeRO stage they start from their beginning.

        Which batch a rank reads depends on the number of ranks, and every sample must count once.
        """
        tensors = saved.rank_local()
        if not tensors:
            return
        self._rng_state = _strip_prefix(tensors, RNG)
        for number, (label, num_done) in enumerate(saved.metadata["done"]):
            accumulators = _strip_prefix(tensors, f"{number}/")
            self._saved[label] = (num_done, {name: value.to(self._device) for name, value in accumulators.items()})


def _strip_prefix(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
