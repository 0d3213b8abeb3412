"""One DAS step with the work that the released ContinualLM code does, as a point of comparison for `step.py`.

Three forward calls (corrupted ids; clean ids twice; clean ids with gates), each with labels, so that the LM head and
the cross-entropy run at every position of all 4B rows; eager attention with the head gate on the attention
probabilities; the mask multiplied into full gradients. Its pairing of views is kept too: the repeated batch is viewed
as (B, 2), which pairs neighbouring sequences. transformers 5 leaves out an attention mask of ones, which the released
code adds, so this form does slightly less work than the original.

Source: https://github.com/UIC-Liu-Lab/ContinualLM (networks/posttrain/model.py, networks/baselines/softmask.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, dropout
from transformers import AttentionInterface, AttentionMaskInterface, RobertaForMaskedLM
from transformers.masking_utils import eager_mask

from tests.helpers.reference import Units

TEMPERATURE = 0.05
ATTENTION = "eager_with_head_gate"


def gated_eager_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    head_gates: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention of (B, N, S, D) by full (B, N, S, S) probabilities, multiplied by `head_gates` (L, N)."""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = drop(scores.softmax(-1), dropout, module.training)
    if head_gates is not None:
        probabilities = probabilities * head_gates[module.layer_idx][None, :, None, None]
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


def drop(probabilities: Tensor, p: float, training: bool) -> Tensor:
    """Dropout under another name than the argument that transformers prescribes for attention functions."""
    return dropout(probabilities, p=p, training=training)


AttentionInterface.register(ATTENTION, gated_eager_attention)
# Without its own mask function an attention function of another name never sees a mask.
AttentionMaskInterface.register(ATTENTION, eager_mask)


class ReleasedForm:
    """Forward, backward and update of the released step, on a model built with `attn_implementation=ATTENTION`."""

    def __init__(
        self, model: RobertaForMaskedLM, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], importance: Units
    ) -> None:
        self.model, self.optimizer, self.batch, self.importance = model, optimizer, batch, importance

    def forward(self) -> Tensor:
        """MLM loss plus contrastive loss."""
        clean, labels = self.batch["input_ids"], self.batch["labels"]
        masked = self._call(self.batch["corrupted_ids"], labels)
        twice = self._call(clean.repeat(2, 1), labels.repeat(2, 1))
        with self._ffn_gates():
            previous = self._call(clean, labels, head_gates=self.importance["head"])
        pairs = twice.hidden_states[-1].unflatten(0, (-1, 2)).mean(dim=2)
        loss: Tensor = masked.loss + contrast(pairs[:, 1], pairs[:, 0], previous.hidden_states[-1].mean(dim=1))
        return loss

    def backward(self, loss: Tensor) -> None:
        """Gradients, then the soft mask on them."""
        torch.autograd.backward(loss)
        self._mask_gradients()

    def update(self) -> None:
        """Optimizer step."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _call(self, input_ids: Tensor, labels: Tensor, **gates: Tensor) -> Any:
        return self.model(
            input_ids=input_ids,
            labels=labels,
            attention_mask=torch.ones_like(input_ids),
            output_hidden_states=True,
            **gates,
        )

    @contextmanager
    def _ffn_gates(self) -> Iterator[None]:
        handles = []
        for index, layer in enumerate(self.model.roberta.encoder.layer):
            for part in ("intermediate", "output"):
                gate = self.importance[part][index]
                dense = getattr(layer, part).dense
                handles.append(dense.register_forward_hook(lambda _, __, output, gate=gate: output * gate))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _mask_gradients(self) -> None:
        head_size = self.model.config.hidden_size // self.model.config.num_attention_heads
        for index, layer in enumerate(self.model.roberta.encoder.layer):
            heads = 1 - self.importance["head"][index].repeat_interleave(head_size)
            attention: Any = layer.attention
            for dense in (attention.self.query, attention.self.key, attention.self.value, attention.output.dense):
                dense.weight.grad *= heads
                dense.bias.grad *= heads
            for part in ("intermediate", "output"):
                dense, scale = getattr(layer, part).dense, 1 - self.importance[part][index]
                dense.weight.grad *= scale[:, None]
                dense.bias.grad *= scale


def contrast(anchor: Tensor, positive: Tensor, previous: Tensor) -> Tensor:
    """Cross-entropy of each anchor's own positive among all positives and all previous views; views (B, H)."""
    candidates = torch.cat([positive, previous])
    similarity = cosine_similarity(anchor[:, None], candidates[None], dim=-1) / TEMPERATURE
    return cross_entropy(similarity, torch.arange(len(anchor), device=anchor.device))
