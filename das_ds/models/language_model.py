"""Language model wrapper: a Hugging Face model whose LM head runs at the predicted positions only.

Shape legend: R rows, S positions, P predicted positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from das_ds.config import TrainConfig
from das_ds.kernels.linear_cross_entropy import Weigh
from das_ds.kernels.linear_divergence import LinearLogits
from das_ds.models.architectures.spec import ArchitectureSpec
from das_ds.models.lm_loss import ChunkedLMLoss, Distillation, positions_per_chunk

DEFAULT_LOGITS_MIB = TrainConfig().max_logits_mib


@dataclass
class Decoding:
    """Calls that give logits in place of losses, and that may continue the rows of earlier calls."""

    cache: Cache | None = None
    """Keys and values of the positions of earlier calls, to which a call adds its own; None: rows are complete."""
    attention_mask: torch.Tensor | None = None
    """(R, earlier and present positions), 0 where nothing attends; None: every position attends to all before it."""
    logits: torch.Tensor | None = None
    """(P, V) float32, of the latest call."""


class LanguageModel(nn.Module):
    """Wraps a Hugging Face model so that one call returns the hidden states of all rows and the losses of P positions.

    The computation stays inside one module call, so that ZeRO-3 gathers every layer once per packed batch.

    Args:
        model: the model.
        spec: its architecture spec.
        logits_mib: largest chunk of logits in MiB, see `lm_loss.py`.
    """

    def __init__(self, model: PreTrainedModel, spec: ArchitectureSpec, *, logits_mib: int = DEFAULT_LOGITS_MIB) -> None:
        super().__init__()
        self.model = model
        self._trains_head_only = False
        self._captured: list[LinearLogits] | None = None
        self._distillation: Distillation | None = None
        self._decoding: Decoding | None = None
        self._head = spec.head(model)
        self._losses = ChunkedLMLoss(
            self._logits,
            spec.projection(model),
            chunk=positions_per_chunk(model.config.vocab_size, logits_mib),
            soft_cap=spec.logit_cap(model),
        )
        self._is_causal = spec.objective == "clm"

    @property
    def num_rows(self) -> int | None:
        """Rows of the vocabulary that can be predicted; None: all. The others are reserved for later domains."""
        return self._losses.num_rows

    @num_rows.setter
    def num_rows(self, num_rows: int | None) -> None:
        self._losses.num_rows = num_rows

    @contextmanager
    def training_head_only(self) -> Iterator[None]:
        """Inside, losses have gradients for the LM head only, without a backward pass through the layers."""
        self._trains_head_only = True
        try:
            yield
        finally:
            self._trains_head_only = False

    @property
    def can_distill(self) -> bool:
        """Whether `capturing_logits` and `distilling` are possible: the LM head ends in a plain `nn.Linear`."""
        return self._losses.can_distill

    @contextmanager
    def capturing_logits(self) -> Iterator[list[LinearLogits]]:
        """Inside, calls append the logits of predicted positions, without gradients; their losses are zeros."""
        self._captured = []
        try:
            yield self._captured
        finally:
            self._captured = None

    @contextmanager
    def distilling(self, distillation: Distillation) -> Iterator[None]:
        """Inside, calls put what some predicted positions learn from a teacher into `distillation.divergences`.

        Their losses are zeros. The positions are counted among those that a call predicts, whose number may be larger.
        """
        self._distillation = distillation
        try:
            yield
        finally:
            self._distillation = None

    @contextmanager
    def decoding(self, decoding: Decoding) -> Iterator[None]:
        """Inside, calls put the logits of predicted positions into `decoding.logits`; their losses are zeros."""
        self._decoding = decoding
        try:
            yield
        finally:
            self._decoding = None

    def forward(
        self,
        input_ids: torch.Tensor,
        predicted: torch.Tensor,
        targets: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        weigh: Weigh | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode packed rows and predict.

        Args:
            input_ids: (R, S) int64.
            predicted: (P,) int64, indices into the flattened (R, S) positions.
            targets: (P,) int64, the tokens to predict there.
            position_ids: (R, S) int64, positions within documents that attention must not cross; None: one document
                per row.
            weigh: weights of predicted positions from their logits, see `ChunkedLMLoss`; None: 1.

        Returns:
            Hidden states (R, S, H), and the weighted cross-entropy of each predicted position (P,) float32.
        """
        options: dict[str, Any] = {} if position_ids is None else {"position_ids": position_ids}
        if self._is_causal:
            # With a KV cache, transformers ignores position_ids, and documents would see each other.
            options["use_cache"] = False
        if self._decoding is not None and self._decoding.cache is not None:
            options |= {
                "use_cache": True,
                "past_key_values": self._decoding.cache,
                "attention_mask": self._decoding.attention_mask,
            }
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._trains_head_only):
            hidden = self.model.base_model(input_ids=input_ids, **options).last_hidden_state
        chosen = hidden.flatten(0, 1).index_select(0, predicted)
        if self._decoding is not None:
            self._decoding.logits = self._losses.logits(chosen)
            return hidden, torch.zeros_like(targets, dtype=torch.float32)
        if self._captured is not None:
            self._captured.append(self._losses.linear_logits(chosen))
            return hidden, torch.zeros_like(targets, dtype=torch.float32)
        if self._distillation is not None:
            losses = self._losses.distilled(chosen, targets, self._distillation, weigh)
            self._distillation.divergences = losses.index_select(0, self._distillation.positions)
            return hidden, losses.index_fill(0, self._distillation.positions, 0.0)
        return hidden, self._losses(chosen, targets, max_positions=input_ids.numel(), weigh=weigh)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(P, H) -> (P, V), before a cap."""
        for module in self._head:
            hidden = module(hidden)
        return hidden
