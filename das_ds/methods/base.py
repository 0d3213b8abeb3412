"""The hooks by which the training loop talks to a method; it never asks a method's name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from das_ds.context import DomainContext, RunContext
from das_ds.data.batch import Batch
from das_ds.distributed.state import ComponentState, SavedComponentState
from das_ds.functional.units import UnitValues

Losses = dict[str, torch.Tensor]
"""Name -> scalar whose mean over ranks and micro-steps is the global loss."""


class Method:
    """A continual-learning method; every hook does nothing special unless a method says otherwise.

    A run that continues calls `load_state` and then the hook in which it had stopped, from its beginning: a hook's
    passes find their sums, and everything else that it does has to give the same when it is done again.
    """

    starts_from_base = False
    """Each domain starts from the base model instead of the previous domain's."""

    def __init__(self, run: RunContext) -> None:
        self.run = run

    def before_domain(self, domain: DomainContext) -> None:
        """Called before the first step on a domain, not when a run continues within its steps."""

    def on_train_start(self, domain: DomainContext) -> None:
        """Called whenever steps on a domain begin or continue, after `before_domain` or `load_state`."""

    def on_step_start(self, step: int) -> None:
        """Called before the micro-steps of optimizer step `step` of the domain, and again when it is tried again."""

    @contextmanager
    def losses(self, batch: Batch, token_scale: torch.Tensor) -> Iterator[Losses]:
        """Named losses of one micro-batch; the backward pass runs inside the context.

        In fp16 a step whose gradient overflowed is done again: the same micro-batches come once more.

        Args:
            batch: this rank's sequences.
            token_scale: scalar; ranks * micro-steps / predicted tokens of the global batch, so that the mean over
                ranks and micro-steps of token_scale * (summed token loss) is the loss per predicted token.
        """
        _, losses = self.run.engine(batch.corrupted_ids, batch.predicted, batch.targets, batch.position_ids)
        yield {self.run.objective: losses.sum() * token_scale}

    def after_domain(self, domain: DomainContext) -> None:
        """Called after the last step on a domain; also writes the files that the method is to leave."""

    def state(self) -> ComponentState:
        """What a run that continues needs of the method; views and references, copied by the caller."""
        return ComponentState()

    def load_state(self, saved: SavedComponentState) -> None:
        """Continue from a state, on any number of ranks."""

    def accumulated_importance(self) -> UnitValues | None:
        """Importance by unit that protects the next domain, for the report; None where the method has none."""
        return None
