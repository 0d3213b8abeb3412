"""The hooks by which the training loop talks to a method; it never asks a method's name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from das_ds.data.batches import Batch
from das_ds.functional.units import Importance
from das_ds.methods.context import RunContext

Losses = dict[str, torch.Tensor]
"""Name -> scalar whose mean over ranks and micro-steps is the global loss."""


@dataclass(frozen=True)
class DomainContext:
    """What a method may use while it is at one domain."""

    index: int
    name: str
    sample_batches: Callable[[str], Iterable[Batch]]
    """Label of a progress bar -> this rank's batches of `importance.samples` training sequences, always the same."""
    sample_steps: Callable[[str], Iterable[list[Batch]]]
    """The same sequences as this rank's micro-batches of whole optimizer steps."""


class Method:
    """A continual-learning method; every hook does nothing special unless a method says otherwise."""

    starts_from_base = False
    """Each domain starts from the base model instead of the previous domain's."""

    def __init__(self, run: RunContext) -> None:
        self.run = run

    def before_domain(self, domain: DomainContext) -> None:
        """Called before the first step on a domain."""

    @contextmanager
    def micro_step(self, batch: Batch, token_scale: torch.Tensor) -> Iterator[Losses]:
        """Named losses of one micro-batch; the backward pass runs inside the context.

        Args:
            batch: this rank's sequences.
            token_scale: scalar; ranks * micro-steps / predicted tokens of the global batch, so that the mean over
                ranks and micro-steps of token_scale * (summed token loss) is the loss per predicted token.
        """
        _, losses = self.run.engine(batch.corrupted_ids, batch.predicted, batch.targets, batch.position_ids)
        yield {self.run.objective: losses.sum() * token_scale}

    def after_domain(self, domain: DomainContext) -> None:
        """Called after the last step on a domain."""

    def save(self, run_folder: Path, domain_folder: Path) -> None:
        """Write what later domains need (called on every rank after `after_domain`; one of them writes a file)."""

    def load(self, run_folder: Path, domain_folders: list[Path]) -> None:
        """Read what `save` wrote for the domains already learned (called on every rank)."""

    def accumulated_importance(self) -> Importance | None:
        """Importance by unit that protects the next domain, for the report; None where the method has none."""
        return None
