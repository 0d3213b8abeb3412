"""A language model whose LM head runs at predicted positions only."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from das_ds.functional.losses import token_losses
from das_ds.models.adapter import ArchitectureAdapter


class LanguageModel(nn.Module):
    """Wraps a Hugging Face model so that one call gives hidden states of all rows and losses of few positions.

    The whole computation stays inside one module call, so ZeRO-3 gathers every layer once per packed batch.
    """

    def __init__(self, model: PreTrainedModel, adapter: ArchitectureAdapter) -> None:
        super().__init__()
        self.model = model
        self._head = adapter.head(model)
        self._logit_cap = adapter.logit_cap(model)

    def forward(
        self,
        input_ids: torch.Tensor,
        predicted: torch.Tensor,
        targets: torch.Tensor,
        position_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode packed rows and predict.

        Args:
            input_ids: (R, S) int64.
            predicted: (P,) int64, indices into the flattened (R, S) positions.
            targets: (P,) int64, the tokens to predict there.
            position_ids: (R, S) int64, positions inside documents that attention does not leave; None: one document.

        Returns:
            Hidden states (R, S, H) and the cross-entropy of each predicted position (P,) float32.
        """
        positions = {} if position_ids is None else {"position_ids": position_ids}
        hidden = self.model.base_model(input_ids=input_ids, **positions).last_hidden_state
        losses = token_losses(self.logits(hidden.flatten(0, 1).index_select(0, predicted)), targets)
        return hidden, losses

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(P, H) -> (P, V)."""
        for part in self._head:
            hidden = part(hidden)
        return hidden if self._logit_cap is None else self._logit_cap * torch.tanh(hidden / self._logit_cap)
