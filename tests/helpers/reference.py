"""The method written out from its mathematics: one process, full tensors, autograd and explicit loops.

Every number that the package computes with hooks, packed passes and shards is compared with these functions, so
nothing of `das_ds` is imported here. Encoders of the BERT kind (RoBERTa, BERT) with a masked-LM head; blocks are
packed, so no position is padding.

Shapes: L layers, N heads, F intermediate units, H hidden size, B sequences, S tokens, P predicted tokens, R noise rows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import PreTrainedModel

Units = dict[str, Tensor]
"""One tensor per unit group: head (L, N), intermediate (L, F), output (L, H)."""
Batch = Mapping[str, Tensor]
"""input_ids (B, S), corrupted_ids (B, S), predicted (P,) indices into the flattened (B * S,), targets (P,)."""


def backbone(model: PreTrainedModel) -> Any:
    """Returns the network below the LM head."""
    return getattr(model, model.base_model_prefix)


def unit_ones(model: PreTrainedModel, *, requires_grad: bool = False) -> Units:
    """Gates that change nothing."""
    config = model.config
    like = next(model.parameters())
    sizes = {
        "head": config.num_attention_heads,
        "intermediate": config.intermediate_size,
        "output": config.hidden_size,
    }
    return {
        group: torch.ones(config.num_hidden_layers, size, dtype=like.dtype, requires_grad=requires_grad)
        for group, size in sizes.items()
    }


def encode(model: PreTrainedModel, input_ids: Tensor, gates: Units) -> Tensor:
    """Final hidden states (B, S, H) of `input_ids` (B, S), every unit multiplied by its gate.

    Heads are gated at their context vector, intermediate units before the activation, outputs before dropout and
    residual. Attention probabilities are never dropped.
    """
    network = backbone(model)
    hidden: Tensor = network.embeddings(input_ids=input_ids)
    for index, layer in enumerate(network.encoder.layer):
        context = attend(layer.attention.self, hidden, model.config.num_attention_heads)
        context = context * gates["head"][index][:, None, None]
        attended = layer.attention.output.dense(context.transpose(1, 2).flatten(2))
        hidden = layer.attention.output.LayerNorm(hidden + layer.attention.output.dropout(attended))
        inner = layer.intermediate.dense(hidden) * gates["intermediate"][index]
        outer = layer.output.dense(layer.intermediate.intermediate_act_fn(inner)) * gates["output"][index]
        hidden = layer.output.LayerNorm(hidden + layer.output.dropout(outer))
    return hidden


def attend(attention: Any, hidden: Tensor, num_heads: int) -> Tensor:
    """Context vectors softmax(Q K^T / sqrt(D)) V per head, (B, N, S, D)."""

    def heads(projection: nn.Module) -> Tensor:
        projected: Tensor = projection(hidden)
        return projected.view(*projected.shape[:-1], num_heads, -1).transpose(1, 2)

    query = heads(attention.query)
    key = heads(attention.key)
    value = heads(attention.value)
    return (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(-1) @ value


def lm_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Vocabulary scores (P, V) of hidden states (P, H)."""
    head: Any = model.lm_head if hasattr(model, "lm_head") else model.cls
    logits: Tensor = head(hidden)
    return logits


# Dropout that can be repeated.


class FixedNoise(nn.Module):
    """Dropout whose mask is fixed per noise row: x (B, S, H) -> x * noise[rows] with noise (R, S, H)."""

    def __init__(self, noise: Tensor) -> None:
        super().__init__()
        self.noise = noise
        self.rows: Sequence[int] = range(len(noise))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.noise[list(self.rows)].to(x.dtype)


def fix_noise(model: PreTrainedModel, num_rows: int, length: int, *, p: float = 0.1, seed: int = 0) -> None:
    """Replaces each dropout on hidden states (embeddings and both sublayers) by its own `FixedNoise`.

    The model's attention dropout must be 0.
    """
    generator = torch.Generator().manual_seed(seed)
    size = (num_rows, length, model.config.hidden_size)
    network = backbone(model)
    layers = [part for layer in network.encoder.layer for part in (layer.attention.output, layer.output)]
    for owner in [network.embeddings, *layers]:
        owner.dropout = FixedNoise(torch.bernoulli(torch.full(size, 1 - p), generator=generator) / (1 - p))


def select_noise(model: nn.Module, rows: Sequence[int]) -> None:
    """Says which noise row each sequence of the next forward passes gets."""
    for module in model.modules():
        if isinstance(module, FixedNoise):
            module.rows = rows


# Importance.


def reference_importance(
    model: PreTrainedModel,
    sequences: Tensor,
    corrupted: Tensor,
    labels: Tensor,
    kind: Literal["mlm", "proxy"] = "mlm",
    power: int = 1,
) -> Units:
    """I = (1/N) sum_n |d L(x_n) / d g|^power, one sequence at a time (paper, eq. 2), before normalization.

    `mlm`: L is the mean cross-entropy over the sequence's predicted tokens (labels != -100), of `corrupted`; a
    sequence without any counts with gradient 0. `proxy`: L is `hidden_kl` of two passes over `sequences` with common
    gates; under `fix_noise`, sequence n of N takes noise row n in the first pass and N + n in the second.

    Args:
        sequences, corrupted, labels: (N, S), int64.
    """
    total = {group: torch.zeros_like(ones) for group, ones in unit_ones(model).items()}
    for index in range(len(sequences)):
        gates = unit_ones(model, requires_grad=True)
        loss = sequence_loss(model, sequences, corrupted, labels, index, gates, kind)
        if loss is not None:
            for group, gradient in zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True):
                total[group] += gradient.abs() ** power
    return {group: value / len(sequences) for group, value in total.items()}


def reference_batch_gradients(
    model: PreTrainedModel,
    sequences: Tensor,
    corrupted: Tensor,
    labels: Tensor,
    kind: Literal["mlm", "proxy"],
    batch_size: int,
) -> list[dict[str, Tensor]]:
    """(1/G) sum_{n in b} d L(x_n) / d theta of each parameter, for every batch b of G sequences.

    Args as in `reference_importance`; the number of sequences is a multiple of G = `batch_size`.
    """
    parameters = dict(model.named_parameters())
    means = []
    for first in range(0, len(sequences), batch_size):
        mean = {name: torch.zeros_like(value) for name, value in parameters.items()}
        for index in range(first, first + batch_size):
            loss = sequence_loss(model, sequences, corrupted, labels, index, unit_ones(model), kind)
            if loss is None:
                continue
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                mean[name] += 0 if gradient is None else gradient / batch_size
        means.append(mean)
    return means


def sequence_loss(
    model: PreTrainedModel,
    sequences: Tensor,
    corrupted: Tensor,
    labels: Tensor,
    index: int,
    gates: Units,
    kind: Literal["mlm", "proxy"],
) -> Tensor | None:
    """L(x_n) of `reference_importance` for n = `index`; None where it is the constant 0."""
    if kind == "proxy":
        views = []
        for row in (index, len(sequences) + index):
            select_noise(model, [row])
            views.append(encode(model, sequences[index : index + 1], gates))
        return hidden_kl(*views)
    if bool((labels[index] == -100).all()):
        return None
    logits = lm_logits(model, encode(model, corrupted[index : index + 1], gates)[0])
    return cross_entropy(logits, labels[index])


def hidden_kl(first: Tensor, second: Tensor) -> Tensor:
    """KL(softmax(first) || softmax(second)) over the hidden dimension, mean over tokens; both (B, S, H)."""
    p = first.softmax(-1)
    q = second.softmax(-1)
    return (p * (p.log() - q.log())).sum(-1).mean()


def normalize(values: Tensor, form: Literal["abs_tanh", "tanh_positive"] = "abs_tanh") -> Tensor:
    """|tanh z| or tanh(max(z, 0)) with z = (x - mean) / std (population) in each row of (L, U); 0 where std is 0."""
    normalized = torch.zeros_like(values)
    for row, x in enumerate(values):
        deviation = ((x - x.mean()) ** 2).mean().sqrt()
        if x.max() > x.min():
            z = (x - x.mean()) / deviation
            normalized[row] = z.tanh().abs() if form == "abs_tanh" else z.clamp(min=0).tanh()
    return normalized


# Soft mask.


def full_masks(
    model: PreTrainedModel, importance: Units, *, include_consumers: bool = False, unowned_update_scale: float = 1.0
) -> dict[str, Tensor]:
    """1 - I spelled out for each parameter, in the parameter's shape.

    Head h owns its rows of W_q, W_k, W_v and their biases and its columns of W_o; intermediate i owns row i of W_in
    and b_in; output o owns row o of W_out and b_out. Every other parameter (b_o among them) has `unowned_update_scale`.
    With `include_consumers`, entry (o, i) of W_out takes the larger importance of output o and intermediate i.
    """
    scales = {name: torch.full_like(value, unowned_update_scale).detach() for name, value in model.named_parameters()}
    head_size = model.config.hidden_size // model.config.num_attention_heads
    for index in range(model.config.num_hidden_layers):
        layer = f"{model.base_model_prefix}.encoder.layer.{index}"
        for h, value in enumerate(importance["head"][index].tolist()):
            owned = slice(h * head_size, (h + 1) * head_size)
            for projection in ("query", "key", "value"):
                scales[f"{layer}.attention.self.{projection}.weight"][owned, :] = 1 - value
                scales[f"{layer}.attention.self.{projection}.bias"][owned] = 1 - value
            scales[f"{layer}.attention.output.dense.weight"][:, owned] = 1 - value
        for i, value in enumerate(importance["intermediate"][index].tolist()):
            scales[f"{layer}.intermediate.dense.weight"][i, :] = 1 - value
            scales[f"{layer}.intermediate.dense.bias"][i] = 1 - value
        for o, value in enumerate(importance["output"][index].tolist()):
            scales[f"{layer}.output.dense.weight"][o, :] = 1 - value
            scales[f"{layer}.output.dense.bias"][o] = 1 - value
            if include_consumers:
                for i, read in enumerate(importance["intermediate"][index].tolist()):
                    scales[f"{layer}.output.dense.weight"][o, i] = 1 - max(value, read)
    return scales


# Training.


class ReferenceRun(NamedTuple):
    """What `reference_train` returns; lists have one entry per step."""

    model: PreTrainedModel
    mlm_losses: list[float]
    contrast_losses: list[float]
    grad_norms: list[float]
    """Global norm before clipping; in gradient mode that of the masked gradient."""


def contrastive_loss(full: Tensor, positive: Tensor, previous: Tensor, temperature: float) -> Tensor:
    """Mean over n of -log e^{s(full_n, positive_n)} / sum_j (e^{s(full_n, positive_j)} + e^{s(full_n, previous_j)}).

    s is the cosine similarity over the temperature; all views (B, H).
    """
    losses = []
    for n in range(len(full)):
        others = torch.cat([positive, previous])
        similarity = cosine_similarity(full[n : n + 1], others) / temperature
        losses.append(similarity.logsumexp(0) - similarity[n])
    return torch.stack(losses).mean()


def step_losses(
    model: PreTrainedModel, micro_batches: Sequence[Batch], gates: Units, temperature: float, *, contrast: bool
) -> tuple[Tensor, Tensor]:
    """MLM loss over all predicted tokens of the step, and contrastive loss averaged over its micro-batches."""
    ones = unit_ones(model)
    num_predicted = sum(len(batch["targets"]) for batch in micro_batches)
    mlm = torch.zeros(())
    contrastive = torch.zeros(())
    for batch in micro_batches:
        predicted = encode(model, batch["corrupted_ids"], ones).flatten(0, 1)[batch["predicted"]]
        mlm = mlm + cross_entropy(lm_logits(model, predicted), batch["targets"], reduction="sum") / num_predicted
        if contrast:
            views = [encode(model, batch["input_ids"], view).mean(1) for view in (ones, ones, gates)]
            full, positive, previous = views
            contrastive = contrastive + contrastive_loss(full, positive, previous, temperature) / len(micro_batches)
    return mlm, contrastive


def reference_train(
    model: PreTrainedModel,
    steps: Sequence[Sequence[Batch]],
    importance: Units | None,
    *,
    learning_rates: Sequence[float],
    apply_to: Literal["update", "gradient", "first_moment"] = "update",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    max_grad_norm: float = 1.0,
    temperature: float = 0.05,
    contrast_weight: float = 1.0,
    include_consumers: bool = False,
    unowned_update_scale: float = 1.0,
    scales: dict[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> ReferenceRun:
    """Trains a copy of `model`, in evaluation mode (no dropout), on `steps` of micro-batches joined over all ranks.

    L = L_mlm + contrast_weight * L_con; `update`: theta <- theta + (1 - I) * Delta, where Delta is AdamW's full step
    with decoupled decay (not for tensors of one dimension); `gradient`: g <- (1 - I) * g before clipping;
    `first_moment`: the first moment sees (1 - I) * g, the second g.
    Clipping as in DeepSpeed: g <- g * min(1, max_grad_norm / (|g| + 1e-6)); 0 does not clip.
    Importance None masks nothing and gates nothing; `contrast_weight` 0 leaves the contrast out. `scales` is 1 - I of
    every weight in place of the units' masks; the importance of units then only gates.
    """
    model = nn.Module.to(copy.deepcopy(model), dtype).train(False)
    gates = unit_ones(model) if importance is None else {group: value.to(dtype) for group, value in importance.items()}
    unmasked = {group: torch.zeros_like(value) for group, value in gates.items()}
    if scales is None:
        scales = full_masks(
            model,
            importance or unmasked,
            include_consumers=include_consumers,
            unowned_update_scale=unowned_update_scale,
        )
    moments = {name: (torch.zeros_like(scale), torch.zeros_like(scale)) for name, scale in scales.items()}
    run = ReferenceRun(model, [], [], [])
    for number, (micro_batches, learning_rate) in enumerate(zip(steps, learning_rates, strict=True), start=1):
        mlm, contrastive = step_losses(model, micro_batches, gates, temperature, contrast=contrast_weight > 0)
        parameters = dict(model.named_parameters())
        gradients = torch.autograd.grad(mlm + contrast_weight * contrastive, list(parameters.values()))
        named = dict(zip(parameters, gradients, strict=True))
        if apply_to == "gradient":
            named = {name: gradient * scales[name] for name, gradient in named.items()}
        norm = math.sqrt(sum(float((gradient.double() ** 2).sum()) for gradient in named.values()))
        clip = min(1.0, max_grad_norm / (norm + 1e-6)) if max_grad_norm > 0 else 1.0
        for name, parameter in parameters.items():
            decay = weight_decay if parameter.ndim > 1 else 0.0
            gradient = named[name] * clip
            routed = gradient * scales[name] if apply_to == "first_moment" else gradient
            delta = adamw_step(
                parameter, gradient, *moments[name], number, learning_rate, betas, eps, decay, first_moment=routed
            )
            parameter.data += delta * scales[name] if apply_to == "update" else delta
        run.mlm_losses.append(mlm.item())
        run.contrast_losses.append(contrastive.item())
        run.grad_norms.append(norm)
    return run


@torch.no_grad()
def adamw_step(
    parameter: Tensor,
    gradient: Tensor,
    m: Tensor,
    v: Tensor,
    number: int,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    *,
    first_moment: Tensor | None = None,
) -> Tensor:
    """-lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * theta) for step `number` = 1, 2, ...; updates m and v.

    `first_moment` is what m averages in place of the gradient.
    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, ICLR 2019, algorithm 2.
    """
    m.copy_(betas[0] * m + (1 - betas[0]) * (gradient if first_moment is None else first_moment))
    v.copy_(betas[1] * v + (1 - betas[1]) * gradient**2)
    m_hat = m / (1 - betas[0] ** number)
    v_hat = v / (1 - betas[1] ** number)
    return -learning_rate * (m_hat / (v_hat.sqrt() + eps) + weight_decay * parameter)
