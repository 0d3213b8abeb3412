"""A masked language model whose LM head runs at predicted positions only."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from das_ds.models.adapter import ArchitectureAdapter


class MaskedLanguageModel(nn.Module):
    """Wraps a Hugging Face model so that one call gives hidden states of all rows and logits of few positions.

    The whole computation stays inside one module call, so ZeRO-3 gathers every layer once per packed batch.
    """

    def __init__(self, model: PreTrainedModel, adapter: ArchitectureAdapter) -> None:
        super().__init__()
        self.model = model
        self._lm_head = adapter.lm_head

    def forward(self, input_ids: torch.Tensor, predicted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode packed rows and predict.

        Args:
            input_ids: (R, S) int64.
            predicted: (P,) int64, indices into the flattened (R, S) positions.

        Returns:
            Hidden states (R, S, H) and logits (P, V).
        """
        hidden = self.model.base_model(input_ids=input_ids).last_hidden_state
        logits = self.model.get_submodule(self._lm_head)(hidden.flatten(0, 1).index_select(0, predicted))
        return hidden, logits
