"""Loss formulas, and pooling of hidden states to one vector per row.

Inputs are already gathered over ranks where a formula needs the global batch.

Shape legend: B local sequences (rows), N global sequences, S positions, H hidden size, P predicted positions.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch.nn import functional


def sequence_token_loss(losses: torch.Tensor, rows: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """Mean loss of each sequence over its own predicted positions.

    Args:
        losses: (P,) float32.
        rows: (P,) int64, the sequence each position belongs to.
        num_sequences: B.

    Returns:
        (B,) float32; 0 for a sequence without predicted positions.
    """
    sums = losses.new_zeros(num_sequences).index_add(0, rows, losses)
    counts = losses.new_zeros(num_sequences).index_add(0, rows, torch.ones_like(losses))
    return sums / counts.clamp_min(1.0)


def representation_kl(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Proxy loss for general knowledge (paper section 3.1): KL(softmax(first) || softmax(second)) over the hidden size.

    Args:
        first, second: (B, S, H) final hidden states of the same input under two dropout masks.

    Returns:
        (B,) float32, the mean over the S positions.
    """
    # In float32 whatever the model computes in.
    return softmax_kl(first.float(), second.float()).mean(dim=1)


def softmax_kl(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """KL(softmax(first) || softmax(second)) over the last dimension: (..., V), (..., V) float -> (...)."""
    log_p = functional.log_softmax(first, dim=-1)
    log_q = functional.log_softmax(second, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def distillation_loss(teacher: torch.Tensor, student: torch.Tensor, *, temperature: float) -> torch.Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) (Hinton et al., 2015, section 2) over the hidden size.

    Args:
        teacher, student: (B, S, H) final hidden states of the same input.
        temperature: T; the factor T^2 keeps the size of the gradient.

    Returns:
        Scalar float32, the mean over all B * S positions.
    """
    kl = representation_kl(teacher.float() / temperature, student.float() / temperature)
    return temperature**2 * kl.mean()


def top_k_entropy(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Entropy of the K most likely tokens, from 0 (one is certain) to 1 (all K are equally likely).

        H_p = -(1 / ln K) sum_k q_pk ln q_pk              q_p = softmax of the K largest logits

    The approximation of the entropy over the vocabulary by which EAFT weights tokens (Diao et al., *Entropy-Adaptive
    Fine-Tuning*, 2026, arXiv 2601.02151).

    Args:
        logits: (P, V) float.
        top_k: K, at least 2; all V tokens where there are fewer.

    Returns:
        (P,) of the type of `logits`.
    """
    num_tokens = min(top_k, logits.shape[-1])
    probabilities = functional.softmax(logits.topk(num_tokens, dim=-1, sorted=False).values, dim=-1)
    # Not p ln p: probabilities may be 0. Rounding may exceed the largest entropy.
    return (torch.special.entr(probabilities).sum(dim=-1) / math.log(num_tokens)).clamp(0.0, 1.0)


def contrastive_loss(
    anchors: torch.Tensor,
    positives: torch.Tensor,
    previous: torch.Tensor,
    *,
    first_positive: int,
    temperature: float,
) -> torch.Tensor:
    """Contrast of full knowledge with previous knowledge (paper eq. 7).

        L = -(1/B) sum_n log [ e^{s(full_n, full+_n)} / sum_j (e^{s(full_n, full+_j)} + e^{s(full_n, prev_j)}) ]

    s is the cosine similarity over the temperature T; n runs over this rank's anchors, j over the global batch.

    Args:
        anchors: (B, H) pooled o^full of this rank.
        positives: (N, H) pooled o^full+ of all ranks.
        previous: (N, H) pooled o^prev of all ranks.
        first_positive: index in `positives` of the first anchor's partner.
        temperature: T.

    Returns:
        Scalar float32.
    """
    # (2N, H); similarity is (B, 2N).
    candidates = torch.cat((positives, previous)).float()
    similarity = functional.normalize(anchors.float(), dim=-1) @ functional.normalize(candidates, dim=-1).T
    partners = torch.arange(first_positive, first_positive + len(anchors), device=anchors.device)
    return functional.cross_entropy(similarity / temperature, partners)


Pooling = Literal["mean", "last"]


def pooling_weights(
    kind: Pooling,
    *,
    num_rows: int,
    num_positions: int,
    position_ids: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Weights w with pooled_b = sum_s w_bs hidden_bs.

    `mean`: 1/n at each of the row's n tokens. `last`: 1/d at the last token of each of the row's d documents, which
    under causal attention is the only one that has read all of its document. Padding is not a token and has weight 0; a
    document of only padding does not count, and a row of only padding has weight 0 everywhere.

    Args:
        kind: which tokens count.
        num_rows: B.
        num_positions: S.
        position_ids: (B, S) int64, 0 where a document begins; None: each row is one document.
        padding: (B, S) bool, True where there is no token; None: all are tokens.
        device: of the weights and of the other tensors.

    Returns:
        (B, S) float32, summing to 1 over each row.
    """
    shape = (num_rows, num_positions)
    is_token = torch.ones(shape, dtype=torch.bool, device=device) if padding is None else ~padding
    chosen = is_token if kind == "mean" else _is_last_token(is_token, position_ids)
    return chosen.float() / chosen.sum(dim=1, keepdim=True).clamp_min(1)


def _is_last_token(is_token: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
    """(B, S) bool, True at the last token of each document that has one."""
    positions = torch.arange(is_token.shape[1], device=is_token.device).expand_as(is_token)
    if position_ids is None:
        document = torch.zeros_like(positions)
    else:
        # Documents of a row are numbered from 0, also where the row begins in the middle of one.
        starts = position_ids == 0
        document = starts.cumsum(dim=1) - starts[:, :1].long()
    # (B, S): the last token's position of document d is in column d; -1 where it has no token.
    token_positions = positions.masked_fill(~is_token, -1)
    last = torch.full_like(positions, -1).scatter_reduce(1, document, token_positions, "amax")
    return positions == last.gather(1, document)


def pool(hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum over positions, in float32: hidden (B, S, H), weights (B, S) float32 -> (B, H) float32."""
    return torch.einsum("bs,bsh->bh", weights, hidden.float())


def bits_per_byte(loss: float, tokens_per_byte: float) -> float:
    """A causal model's loss in bits per byte of text, which does not depend on how a tokenizer splits the text.

        BPB = loss / ln 2 * tokens / bytes        (Gao et al., *The Pile*, 2020, section 3.1)

    Args:
        loss: nats per token.
        tokens_per_byte: number of tokens of the text / number of its bytes in UTF-8.
    """
    return loss / math.log(2.0) * tokens_per_byte
