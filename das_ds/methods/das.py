"""DAS: soft masking and contrast (Ke et al., Continual Pre-training of Language Models, ICLR 2023).

Shape legend: B local sequences, S positions, H hidden size, L layers, U units.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from das_ds.config import ObjectiveName
from das_ds.data.batches import Batch
from das_ds.distributed.collectives import gather_rows, rank
from das_ds.distributed.state import RankState, SavedState
from das_ds.functional.losses import contrastive_loss
from das_ds.functional.pooling import Pooling, pool, pooling_weights
from das_ds.functional.units import Importance
from das_ds.methods.base import DomainContext, Losses, Method
from das_ds.methods.context import RunContext
from das_ds.methods.importance_level import ImportanceLevel
from das_ds.methods.importance_pass import GENERAL_KNOWLEDGE, PRETRAINING, repeated
from das_ds.methods.parameter_level import ParameterLevel
from das_ds.methods.unit_level import UnitLevel

logger = logging.getLogger(__name__)

CONTRAST_LOSS = "contrast"
IMPORTANCE_FILE = "importance.safetensors"
GENERAL_IMPORTANCE_FILE = "importance_general.safetensors"


POOLING: dict[ObjectiveName, Pooling] = {"mlm": "mean", "clm": "last"}
"""Under causal attention only the last token has read the whole text."""
LEVELS: dict[str, type[ImportanceLevel[Any]]] = {"unit": UnitLevel, "parameter": ParameterLevel}


class SoftMaskedContrast(Method):
    """Protects what is important to earlier knowledge and contrasts full with previous knowledge.

    Keeps (heads + intermediate + hidden) numbers per layer, or, at parameter level, one byte per weight divided over
    the ranks. Extra compute: three more rows per sequence in the packed forward pass, and one forward and backward
    pass over `importance.samples` sequences per domain.
    """

    def __init__(self, run: RunContext) -> None:
        super().__init__(run)
        self._level = LEVELS[run.config.method.importance.granularity](run)
        self._accumulated: Any = None
        self._by_unit: Importance | None = None

    def before_domain(self, domain: DomainContext) -> None:
        """Before the first domain: importance of general knowledge."""
        if self._accumulated is None:
            general = self._initial_importance(domain)
            self._level.write(domain.run_folder / GENERAL_IMPORTANCE_FILE, general)
            self._accumulate(general)

    def start_training(self, domain: DomainContext) -> None:
        """Protect what was learned so far."""
        assert self._by_unit is not None, "importance was accumulated"
        self._previous_gates = {group: values[:, None, :] for group, values in self._by_unit.items()}
        self.protect()

    def protect(self) -> None:
        """Soft-mask all further steps by I^(<=t-1)."""
        self._level.protect(self._accumulated)

    @contextmanager
    def micro_step(self, batch: Batch, token_scale: torch.Tensor) -> Iterator[Losses]:
        """The pre-training loss plus the contrast of three clean views, in one packed forward of 4B rows.

        Rows: [corrupted | o^full | o^full+ | o^prev]; dropout makes the clean views differ (noise at the units where
        the network has none), and only the last B rows pass through the gates g = I^(<=t-1). For causal models the
        first rows are as clean as the others but for the noise.
        """
        contrast = self.run.config.method.contrast
        if contrast.weight == 0.0:
            with super().micro_step(batch, token_scale) as losses:
                yield losses
            return
        size = len(batch.input_ids)
        rows = torch.cat((batch.corrupted_ids, batch.input_ids.repeat(3, 1)))
        noise = self.run.gates.noise(self.run.view_dropout, num_rows=4 * size, first_row=size)
        gates = self.run.gates.active(self._previous_gates, num_rows=4 * size, first_row=3 * size)
        with noise, gates:
            hidden, losses = self.run.engine(rows, batch.predicted, batch.targets, repeated(batch.position_ids, 4))
            full, positive, previous = self._pooled(hidden[size:], batch.position_ids).chunk(3)
            loss = contrastive_loss(
                full,
                gather_rows(positive),
                gather_rows(previous),
                first_positive=rank() * size,
                temperature=contrast.temperature,
            )
            yield {
                self.run.objective: losses.sum() * token_scale,
                CONTRAST_LOSS: contrast.weight * loss,
            }

    def _pooled(self, hidden: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
        """(3B, S, H) -> (3B, H)."""
        kind = self.run.config.method.contrast.pooling
        weights = pooling_weights(
            POOLING[self.run.objective] if kind == "auto" else kind,
            num_rows=len(hidden),
            num_positions=hidden.shape[1],
            position_ids=repeated(position_ids, 3),
            device=hidden.device,
        )
        return pool(hidden, weights)

    def after_domain(self, domain: DomainContext) -> None:
        """Importance of the domain just learned, and EMax with all before."""
        latest = self._level.measure(domain, f"importance of {domain.name}", PRETRAINING)
        self._accumulate(latest)
        self._level.write(domain.folder / IMPORTANCE_FILE, latest)
        self._level.write(domain.run_folder / IMPORTANCE_FILE, self._accumulated)

    def state(self) -> RankState:
        """Accumulated importance, once there is some."""
        has_importance = self._accumulated is not None
        state = self._level.state(self._accumulated) if has_importance else RankState()
        return replace(state, numbers={"has_importance": has_importance})

    def load_state(self, saved: SavedState) -> None:
        """Continue with accumulated importance."""
        if saved.numbers["has_importance"]:
            self._accumulated = self._level.load_state(saved)
            self._by_unit = self._level.by_unit(self._accumulated)

    def accumulated_importance(self) -> Importance | None:
        """I^(<=t) by unit."""
        return self._by_unit

    def _accumulate(self, new: Any) -> None:
        self._accumulated = self._level.maximum(new, self._accumulated)
        self._by_unit = self._level.by_unit(self._accumulated)

    def _initial_importance(self, domain: DomainContext) -> Any:
        path = self.run.config.method.importance.initial
        if path is not None:
            return self._level.read(Path(path))
        general = self._level.measure(domain, "importance of general knowledge", GENERAL_KNOWLEDGE)
        is_zero = not any(values.any() for values in self._level.by_unit(general).values())
        if is_zero and self.run.engine.ranks.info.is_main:
            logger.warning(
                "general knowledge protects nothing: its importance is zero, as in a model without dropout, whose "
                "two views are equal; the views of the contrast are then equal too"
            )
        return general
