"""Reference step: the work that the released ContinualLM code does in one DAS step, for comparison in `step.py`.

It makes three forward calls (corrupted ids; clean ids twice; clean ids with gates), each with labels, so the LM head
and the cross-entropy run at every position of all 4B rows. It uses eager attention with the head gate on the attention
probabilities, and multiplies the mask into full gradients. The language-modeling losses of the clean calls are computed
but not used, so nothing is propagated back through their LM heads. The released pairing of views is reproduced too: the
repeated batch is viewed as (B, 2), which pairs neighboring sequences.

Source: https://github.com/UIC-Liu-Lab/ContinualLM (networks/posttrain/model.py, networks/baselines/softmask.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, dropout
from transformers import AttentionInterface, RobertaForMaskedLM

from das_ds.data.batch import Batch
from das_ds.functional.units import UnitValues

TEMPERATURE = 0.05
ATTENTION = "eager_with_head_gate"
IGNORED = -100


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
    """Dropout, renamed because transformers gives attention functions an argument called `dropout`."""
    return dropout(probabilities, p=p, training=training)


AttentionInterface.register(ATTENTION, gated_eager_attention)


class ReferenceStep:
    """The released step on full tensors, for a model whose attention implementation is `ATTENTION`.

    In bf16 the forward pass runs under autocast over fp32 weights, as `accelerate` does in the released code.
    """

    def __init__(
        self,
        model: RobertaForMaskedLM,
        optimizer: torch.optim.Optimizer,
        batch: Batch,
        importance: UnitValues,
        precision: str,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.importance = importance
        self.precision = precision
        self.clean = batch.input_ids
        self.corrupted = batch.corrupted_ids
        labels = torch.full_like(self.clean, IGNORED).flatten()
        self.labels = labels.index_put((batch.predicted,), batch.targets).view_as(self.clean)

    def step(self) -> Iterator[None]:
        """One optimizer step; yields after forward, backward (including the mask on gradients) and update."""
        with torch.autocast(self.clean.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            loss = self._loss()
        yield
        torch.autograd.backward(loss)
        self._mask_gradients()
        yield
        self.optimizer.step()
        self.optimizer.zero_grad()
        yield

    def _loss(self) -> Tensor:
        masked = self._call(self.corrupted, self.labels)
        twice = self._call(self.clean.repeat(2, 1), self.labels.repeat(2, 1))
        with self._ffn_gates():
            previous = self._call(self.clean, self.labels, head_gates=self.importance["head"])
        pairs = twice.hidden_states[-1].unflatten(0, (-1, 2)).mean(dim=2)
        loss: Tensor = masked.loss + contrastive_loss(pairs[:, 1], pairs[:, 0], previous.hidden_states[-1].mean(dim=1))
        return loss

    def _call(self, input_ids: Tensor, labels: Tensor, **gates: Tensor) -> Any:
        return self.model(
            input_ids=input_ids,
            labels=labels,
            # Additive, as in older versions of transformers; version 5 would drop a mask of ones.
            attention_mask=torch.zeros(len(input_ids), 1, 1, input_ids.shape[1], device=input_ids.device),
            output_hidden_states=True,
            **gates,
        )

    @contextmanager
    def _ffn_gates(self) -> Iterator[None]:
        handles = []
        for index, layer in enumerate(self.model.roberta.encoder.layer):
            for group in ("intermediate", "output"):
                gate = self.importance[group][index]
                dense = getattr(layer, group).dense
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
            for group in ("intermediate", "output"):
                dense = getattr(layer, group).dense
                scale = 1 - self.importance[group][index]
                dense.weight.grad *= scale[:, None]
                dense.bias.grad *= scale


def contrastive_loss(anchor: Tensor, positive: Tensor, previous: Tensor) -> Tensor:
    """Cross-entropy of each anchor's positive among all positives and all previous views; all views are (B, H)."""
    candidates = torch.cat([positive, previous])
    similarity = cosine_similarity(anchor[:, None], candidates[None], dim=-1) / TEMPERATURE
    return cross_entropy(similarity, torch.arange(len(anchor), device=anchor.device))
