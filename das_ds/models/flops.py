"""Floating-point operations of a training step, counted on a network without weights.

Shape legend: T tokens, S tokens of a sequence, P predicted tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from das_ds.config import FrozenPart, ObjectiveName, RunConfig


@dataclass(frozen=True)
class StepFlops:
    """Operations of the matrix products of a plain step, forward and backward."""

    body: int
    """Of the layers, over all T tokens."""
    attention: int
    """Of queries with keys, and of attention with values."""
    head: int
    """Of the LM head, over the P predicted tokens."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.body + self.attention + self.head

    @property
    def forward(self) -> int:
        """Of the forward pass through the layers, without the head."""
        return (self.body + self.attention) // 3

    def without_frozen(self, part: FrozenPart, num_layers: int) -> StepFlops:
        """With part of `num_layers` equal layers frozen: they have no gradients of weights, a third of the operations
        of their weights, and above frozen embeddings no backward pass at all, two thirds of all their operations.
        """
        body = self.body * part.num_layers // num_layers
        attention = self.attention * part.num_layers // num_layers
        if part.embeddings:
            return StepFlops(self.body - 2 * body // 3, self.attention - 2 * attention // 3, self.head)
        return StepFlops(self.body - body // 3, self.attention, self.head)


def run_step_flops(model: Any, config: RunConfig, objective: ObjectiveName, num_layers: int) -> StepFlops:
    """Operations of an optimizer step of a run over its global batch, as plain training would take it.

    LoRA's own matrices are not counted.

    Args:
        model: its network with complete weights or on the meta device, without LoRA.
        config: of the run.
        objective: of pre-training, which decides on the number of predicted tokens: on average those of the config.
        num_layers: of the network.
    """
    length = config.data.sequence_length
    num_tokens = config.train.global_batch_size * length
    predicted = config.data.mlm_probability if objective == "mlm" else 1.0
    flops = step_flops(
        model, num_tokens=num_tokens, num_predicted=round(num_tokens * predicted), sequence_length=length
    )
    if config.model.lora is not None:
        # Frozen weights have no gradient, which is a third of the operations of a trained one.
        flops = StepFlops(body=flops.body * 2 // 3, attention=flops.attention, head=flops.head * 2 // 3)
    if config.method.frozen_part is not None:
        flops = flops.without_frozen(config.method.frozen_part, num_layers)
    return flops


def step_flops(model: Any, *, num_tokens: int, num_predicted: int, sequence_length: int) -> StepFlops:
    """Operations of a plain step (Chowdhery et al., *PaLM*, 2022, appendix B).

        6 T sum(weights of the body) + 12 T S sum over layers of heads x head size + 6 P sum(weights of the head)

    A weight of a linear layer takes 2 operations per token forward and 4 backward; attention takes 4 S x width per
    token and layer forward, and twice that backward. Causal attention counts in full, as in PaLM. Of stacked experts,
    those count that one token uses. Recomputed activations are not counted.

    Args:
        model: a Hugging Face model with its LM head, on any device.
        num_tokens: T.
        num_predicted: P, the only tokens at which the head runs.
        sequence_length: S.
    """
    config = model.config
    in_body = {id(module) for module in model.base_model.modules()}
    body = 0
    head = 0
    for module in model.modules():
        used = _used_weights(module, config)
        if id(module) in in_body:
            body += used
        else:
            head += used
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention_width = config.num_hidden_layers * config.num_attention_heads * head_size
    return StepFlops(
        body=6 * num_tokens * body,
        attention=12 * num_tokens * sequence_length * attention_width,
        head=6 * num_predicted * head,
    )


def _used_weights(module: nn.Module, config: Any) -> int:
    """Weights of a module itself that multiply a token."""
    if isinstance(module, nn.Embedding):
        return 0
    used = 0
    for parameter in module.parameters(recurse=False):
        if parameter.dim() == 3:
            num_experts = parameter.shape[0]
            used += parameter.numel() // num_experts * getattr(config, "num_experts_per_tok", num_experts)
        elif parameter.dim() == 2:
            used += parameter.numel()
    return used
