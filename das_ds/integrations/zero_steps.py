"""Masked steps of a DeepSpeed engine that another trainer built, at ZeRO stages 0 to 3."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from das_ds.config import ImportanceScore
from das_ds.distributed.process_group import ProcessGroup
from das_ds.distributed.state import Flats, zeros_by_flat
from das_ds.engine.zero import (
    base_optimizer,
    call_before_steps,
    check_engine,
    flats_by_parameter,
    full_shape,
    get_gradients,
    observing_steps,
    release_gathered_weights,
    shards,
)
from das_ds.errors import ConfigError
from das_ds.functional.importance import importance_score
from das_ds.integrations.steps import Backward, HookedSteps, WeightsOfSteps


class ZeroSteps(HookedSteps):
    """Steps of DeepSpeed's flat tensors, whose gradients are masked before they are clipped.

    Args:
        engine: DeepSpeed's.
        parameters: name -> parameter of everything that is trained.
        ranks: the process group.

    Raises:
        ConfigError: an engine whose steps cannot be masked.
    """

    def __init__(self, engine: Any, parameters: dict[str, nn.Parameter], ranks: ProcessGroup) -> None:
        check_engine(engine)
        names = {parameter: name for name, parameter in parameters.items()}
        weights = WeightsOfSteps(list(shards(engine, names)), flats_by_parameter(engine, names))
        super().__init__(parameters, weights, ranks)
        self._engine = engine
        self._find_gradients = get_gradients(engine, weights.shards, parameters)

    def attach_engine(self) -> None:
        """Mask the steps of the engine from now on."""
        self.attach(base_optimizer(self._engine))
        self._removes.append(call_before_steps(self._engine, self._start_step))

    def _start_step(self) -> None:
        # Masked once for all flat tensors, which DeepSpeed steps one after the other. A step that overflowed did not
        # come to its end.
        self._is_masked = False
        self.mask_gradients()

    def _gradients(self) -> Sequence[torch.Tensor]:
        return self._find_gradients()

    @property
    def runner(self) -> Callable[..., Any]:
        """The engine."""
        runner: Callable[..., Any] = self._engine
        return runner

    def full_shape(self, parameter: nn.Parameter) -> torch.Size:
        """Also where ZeRO 3 left an empty vector of it."""
        return full_shape(parameter)

    def release_gathered(self) -> None:
        """See `HookedSteps`."""
        release_gathered_weights(self._engine)

    @contextmanager
    def accumulate_importance(self, kind: ImportanceScore) -> Iterator[tuple[Flats, Backward]]:
        """See `HookedSteps`; gradients pass through all of DeepSpeed but clipping.

        Raises:
            ConfigError: an engine in fp16, whose loss scale these steps would change.
        """
        if self._engine.fp16_enabled():
            raise ConfigError(
                "method: found parameter with DeepSpeed in fp16, whose loss scale measuring would change; expected "
                "bf16 or fp32, or method directions or unit"
            )
        sums = zeros_by_flat(self.weights.shards, torch.float32)

        def add_score(flat: torch.Tensor) -> None:
            # A flat tensor in which this rank has only padding has no sum.
            if flat in sums and flat.grad is not None:
                sums[flat] += importance_score(flat.grad.view(-1), flat.detach().view(-1), kind)

        def backward(loss: torch.Tensor) -> None:
            self._engine.backward(loss)
            self._engine.step()

        is_attached = self.is_attached
        # What is measured are gradients as they are.
        self.detach()
        try:
            with observing_steps(self._engine, add_score):
                yield sums, backward
        finally:
            if is_attached:
                self.attach_engine()
