"""DAS: soft masking and contrast (Ke et al., Continual Pre-training of Language Models, ICLR 2023).

Shape legend: B local sequences, S positions, H hidden size, L layers, U units.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from das_ds.data.batches import Batch
from das_ds.distributed.collectives import gather_rows, rank
from das_ds.functional.importance import elementwise_maximum, normalise
from das_ds.functional.losses import contrastive_loss, mean_pool, token_loss_sum
from das_ds.functional.units import Importance
from das_ds.methods.base import PRETRAIN_LOSS, DomainContext, Losses, Method, RunContext
from das_ds.methods.importance_file import load_importance, save_importance
from das_ds.methods.importance_pass import (
    GatedLoss,
    general_knowledge_loss,
    mean_absolute_gate_gradient,
    pretraining_loss,
)

logger = logging.getLogger(__name__)

CONTRAST_LOSS = "contrast"
IMPORTANCE_FILE = "importance.safetensors"
GENERAL_IMPORTANCE_FILE = "importance_general.safetensors"


class SoftMaskedContrast(Method):
    """Protects units by their importance to earlier knowledge and contrasts full with previous knowledge.

    Keeps (heads + intermediate + hidden) numbers per layer. Extra compute: three more rows per sequence in the packed
    forward pass, and one forward and backward pass over `importance.samples` sequences per domain.
    """

    def __init__(self, run: RunContext) -> None:
        super().__init__(run)
        self._general: Importance | None = None
        self._latest: Importance | None = None
        self._accumulated: Importance | None = None

    def before_domain(self, domain: DomainContext) -> None:
        """Before the first domain: importance of general knowledge; always: protect what was learned so far."""
        if self._accumulated is None:
            self._general = self._initial_importance(domain)
            self._accumulated = elementwise_maximum(self._general, None)
        self._previous_gates = {group: values[:, None, :] for group, values in self._accumulated.items()}
        self.run.engine.protect(self.run.layout, self._accumulated, self.run.config.method.softmask)

    @contextmanager
    def micro_step(self, batch: Batch, token_scale: torch.Tensor) -> Iterator[Losses]:
        """MLM on the corrupted rows plus the contrast of three clean views, in one packed forward of 4B rows.

        Rows: [corrupted | o^full | o^full+ | o^prev]; dropout makes the clean views differ, and only the last B rows
        pass through the gates g = I^(<=t-1).
        """
        contrast = self.run.config.method.contrast
        if contrast.weight == 0.0:
            with super().micro_step(batch, token_scale) as losses:
                yield losses
            return
        size = len(batch.input_ids)
        rows = torch.cat((batch.corrupted_ids, batch.input_ids.repeat(3, 1)))
        with self.run.gates.active(self._previous_gates, first_row=3 * size):
            hidden, logits = self.run.engine(rows, batch.predicted)
            full, positive, previous = mean_pool(hidden[size:]).chunk(3)
            loss = contrastive_loss(
                full,
                gather_rows(positive),
                gather_rows(previous),
                first_positive=rank() * size,
                temperature=contrast.temperature,
            )
            yield {
                PRETRAIN_LOSS: token_loss_sum(logits, batch.targets) * token_scale,
                CONTRAST_LOSS: contrast.weight * loss,
            }

    def after_domain(self, domain: DomainContext) -> None:
        """Importance of the domain just learned, and EMax with all before."""
        self._latest = self._measure(domain, f"importance of {domain.name}", pretraining_loss)
        self._accumulated = elementwise_maximum(self._latest, self._accumulated)

    def save(self, run_folder: Path, domain_folder: Path) -> None:
        """The domain's own importance, that of general knowledge, and their maximum."""
        assert self._latest is not None and self._accumulated is not None, "save comes after after_domain"
        if self._general is not None:
            save_importance(run_folder / GENERAL_IMPORTANCE_FILE, self._general, self.run.layout)
        save_importance(domain_folder / IMPORTANCE_FILE, self._latest, self.run.layout)
        save_importance(run_folder / IMPORTANCE_FILE, self._accumulated, self.run.layout)

    def load(self, run_folder: Path, domain_folders: list[Path]) -> None:
        """Accumulate anew from the parts: a stop between two files cannot leave a domain's importance in too early."""
        parts = [run_folder / GENERAL_IMPORTANCE_FILE, *(folder / IMPORTANCE_FILE for folder in domain_folders)]
        for path in parts:
            loaded = load_importance(path, self.run.layout)
            device = self.run.engine.ranks.info.device
            self._accumulated = elementwise_maximum({g: v.to(device) for g, v in loaded.items()}, self._accumulated)

    def accumulated_importance(self) -> Importance | None:
        """I^(<=t)."""
        return self._accumulated

    def _initial_importance(self, domain: DomainContext) -> Importance:
        path = self.run.config.method.importance.initial
        if path is None:
            general = self._measure(domain, "importance of general knowledge", general_knowledge_loss)
            if self.run.engine.ranks.info.is_main and not any(values.any() for values in general.values()):
                logger.warning(
                    "general knowledge protects nothing: its importance is zero, as in a model without dropout, whose "
                    "two views are equal; the views of the contrast are then equal too"
                )
            return general
        device = self.run.engine.ranks.info.device
        return {g: v.to(device) for g, v in load_importance(Path(path), self.run.layout).items()}

    def _measure(self, domain: DomainContext, label: str, loss: GatedLoss) -> Importance:
        raw = mean_absolute_gate_gradient(self.run, domain.sample_batches(label), loss)
        form = self.run.config.method.importance.normalisation
        return {group: normalise(values, form) for group, values in raw.items()}
