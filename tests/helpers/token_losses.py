"""Chunked LM loss inside the product's engine on real ranks."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from das_ds.config import RunConfig
from das_ds.config.deepspeed import build_engine_config
from das_ds.distributed.process_group import init_process_group
from das_ds.engine.engine import Engine
from das_ds.engine.zero import get_gradients
from das_ds.models.lm_loss import ChunkedLMLoss
from helpers.tiny_models import NO_DROPOUT, tiny_model

ROWS = 3
LENGTH = 12
VOCABULARY = 100
CHUNK = 5
POSITIONS = (17, 0), (4, 13), (36, 36)
"""Predicted positions of the two ranks, in one chunk and in several, in every micro-step."""

Gradients = list[tuple[str, int, torch.Tensor]]


class Wrapped(nn.Module):
    """A projection that is no `nn.Linear` itself, as adapters make it."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The inner projection's logits."""
        return self.inner(hidden)


class Predictor(nn.Module):
    """A model and the losses of some of its positions."""

    def __init__(self, model: PreTrainedModel, chunk: int, *, wrapped: bool = False) -> None:
        super().__init__()
        self.model = model
        if wrapped:
            model.lm_head.decoder = Wrapped(model.lm_head.decoder)
        head = model.lm_head
        self._losses = ChunkedLMLoss(head, getattr(head, "decoder", head), chunk=chunk)

    def forward(
        self, input_ids: torch.Tensor, predicted: torch.Tensor, targets: torch.Tensor, gate: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(P,) losses; `gate` (H,) multiplies the last hidden states."""
        hidden = self.model.base_model(input_ids=input_ids).last_hidden_state
        hidden = hidden if gate is None else hidden * gate
        chosen = hidden.flatten(0, 1).index_select(0, predicted)
        return self._losses(chosen, targets, max_positions=input_ids.numel())


def language_model(model_type: str) -> PreTrainedModel:
    """A tiny model whose LM head and input embeddings are one weight."""
    if model_type == "roberta":
        return tiny_model("roberta", **NO_DROPOUT)
    config = AutoConfig.for_model(
        model_type, vocab_size=VOCABULARY, n_embd=24, n_layer=2, n_head=3, n_positions=40, initializer_range=0.2,
        bos_token_id=None, eos_token_id=None, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def inputs(losses: int, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input ids, predicted positions and targets of one rank's micro-step."""
    generator = torch.Generator().manual_seed(10 * losses + rank)
    input_ids = torch.randint(5, VOCABULARY, (ROWS, LENGTH), generator=generator)
    order = torch.randperm(ROWS * LENGTH, generator=generator)
    predicted = order[: POSITIONS[losses][rank]].sort().values
    return input_ids, predicted, torch.randint(5, VOCABULARY, (len(predicted),), generator=generator)


def weighted(losses: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A sum in which every token counts differently."""
    return (losses * (1.0 + targets / VOCABULARY)).sum()


def gradients_in_engine(
    config: RunConfig, forms: list[tuple[str, int, bool, int | None]]
) -> list[tuple[Gradients, torch.Tensor]]:
    """This rank's shards of the averaged gradient, and a gate's gradient.

    A form is (model type, chunk, wrapped, rows of the vocabulary).
    """
    return [_gradients(config, *form) for form in forms]


def _gradients(
    config: RunConfig, model_type: str, chunk: int, wrapped: bool, num_rows: int | None
) -> tuple[Gradients, torch.Tensor]:
    ranks = init_process_group()
    model = language_model(model_type)
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    module = Predictor(model, chunk, wrapped=wrapped)
    module._losses.num_rows = num_rows
    parameters = {name.replace("inner.", ""): weight for name, weight in model.named_parameters()}
    engine = Engine(module, parameters, config.train, build_engine_config(config, ranks.info.world_size), ranks)
    engine.start_domain(4)
    gate = torch.ones(model.config.hidden_size, dtype=next(model.parameters()).dtype, requires_grad=True)
    for step in range(len(POSITIONS)):
        input_ids, predicted, targets = inputs(step, ranks.info.rank)
        measured = weighted(engine.module(input_ids, predicted, targets, gate), targets)
        (gate_gradient,) = torch.autograd.grad(measured, gate)
        engine.weights.release_gathered()
        engine.backward(weighted(engine(input_ids, predicted, targets), targets))
        if step < len(POSITIONS) - 1:
            engine.step()
    shards = engine.weights.shards
    found = [
        (shard.name, shard.param_start, gradient.detach().float().clone())
        for shard, gradient in zip(shards, get_gradients(engine._engine, shards, parameters)(), strict=True)
    ]
    left = [n for n, p in parameters.items() if getattr(getattr(p, "ds_status", None), "name", "") == "AVAILABLE"]
    assert not left, f"ZeRO-3 left weights gathered: {left}"
    engine.close()
    return found, gate_gradient
