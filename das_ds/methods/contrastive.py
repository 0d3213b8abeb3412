"""Contrastive loss: all knowledge against earlier knowledge, in one forward pass with the pre-training loss.

Shape legend: B local sequences, S positions, H hidden size, L layers, U units.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from das_ds.config import ObjectiveName, RunConfig, Section
from das_ds.distributed.collectives import all_gather_with_grad, rank
from das_ds.functional.losses import Pooling, contrastive_loss, pool, pooling_weights
from das_ds.functional.units import UnitValues
from das_ds.methods.base import Losses
from das_ds.models.size import FP32, Collective, ModelSize, StepUse

if TYPE_CHECKING:
    from das_ds.context import RunContext
    from das_ds.data.batch import Batch

CONTRAST_LOSS = "contrast"
NUM_CLEAN_VIEWS = 3
"""Rows that the packed forward pass has for each sequence in addition to the corrupted one."""

POOLING: dict[ObjectiveName, Pooling] = {"mlm": "mean", "clm": "last"}
"""Under causal attention only the last token has read the complete text."""


class ContrastiveConfig(Section):
    """The contrastive loss that integrates old and new knowledge."""

    weight: float = Field(default=1.0, ge=0.0)
    """Factor of the contrastive loss; 0 leaves it (and its three extra views) out."""
    temperature: float = Field(default=0.05, gt=0.0)
    """Temperature of the cosine similarities."""
    pooling: Literal["auto", "mean", "last"] = "auto"
    """One vector per sequence: the mean over its tokens or its last token (of each isolated document); `auto` is mean
    for masked and last for causal models."""


class ContrastiveLoss:
    """Ke et al. 2023, section 3.2. Keeps nothing; three more rows per sequence in the forward pass."""

    def __init__(self, run: RunContext, settings: ContrastiveConfig) -> None:
        self._run = run
        self._settings = settings

    @contextmanager
    def losses(self, batch: Batch, token_scale: torch.Tensor, gates: UnitValues) -> Iterator[Losses]:
        """The pre-training loss plus the contrast of three clean views, in one packed forward of 4B rows.

        Rows: [corrupted | o^full | o^full+ | o^prev]; dropout makes the clean views differ (noise at the units where
        the network has none), and only the last B rows pass through the gates. For causal models the first rows are
        as clean as the others but for the noise. The backward pass runs inside the context.

        Args:
            batch, token_scale: as for `Method.losses`.
            gates: group -> (L, U), the factor of every unit in o^prev.
        """
        from das_ds.softmask.measure import duplicate_rows

        run = self._run
        size = len(batch.input_ids)
        rows = torch.cat((batch.corrupted_ids, batch.input_ids.repeat(NUM_CLEAN_VIEWS, 1)))
        noise = run.gates.noise(run.view_dropout, num_rows=4 * size, first_row=size)
        by_layer = {group: values[:, None, :] for group, values in gates.items()}
        with noise, run.gates.active(by_layer, num_rows=4 * size, first_row=3 * size):
            hidden, losses = run.engine(rows, batch.predicted, batch.targets, duplicate_rows(batch.position_ids, 4))
            full, positive, previous = self._pooled(hidden[size:], batch.position_ids).chunk(3)
            loss = contrastive_loss(
                full,
                all_gather_with_grad(positive),
                all_gather_with_grad(previous),
                first_positive=rank() * size,
                temperature=self._settings.temperature,
            )
            yield {run.objective: losses.sum() * token_scale, CONTRAST_LOSS: self._settings.weight * loss}

    def _pooled(self, hidden: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
        """(3B, S, H) -> (3B, H)."""
        from das_ds.softmask.measure import duplicate_rows

        kind = self._settings.pooling
        weights = pooling_weights(
            POOLING[self._run.objective] if kind == "auto" else kind,
            num_rows=len(hidden),
            num_positions=hidden.shape[1],
            position_ids=duplicate_rows(position_ids, 3),
            device=hidden.device,
        )
        return pool(hidden, weights)


def contrastive_step_use(config: RunConfig, size: ModelSize) -> StepUse:
    """Vectors (B, H) of two views of all sequences, gathered in the forward pass; their gradients, in the backward.

    One number per sequence and hidden unit in float32, over all micro-steps.
    """
    views = 2 * FP32 * config.train.global_batch_size * size.hidden
    return StepUse(
        collectives=(
            Collective("all_gather", "views of the contrast", views),
            Collective("all_reduce", "gradients of the views", views),
        ),
        num_losses=1,
    )
