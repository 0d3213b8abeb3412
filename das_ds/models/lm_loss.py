"""LM loss in chunks: the cross-entropy of the predicted positions without the logits of all of them at once.

Shape legend: P predicted positions of this rank, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from das_ds.kernels.linear_cross_entropy import Weigh, linear_cross_entropy
from das_ds.kernels.linear_divergence import LinearLogits, linear_divergence

MIB = 2**20


def positions_per_chunk(vocab_size: int, logits_mib: int) -> int:
    """Positions whose float32 logits fill `logits_mib` MiB; at least one."""
    return max(1, logits_mib * MIB // (torch.float32.itemsize * vocab_size))


@dataclass
class Distillation:
    """Predicted positions that learn a teacher's prediction in place of a token."""

    positions: torch.Tensor
    """(Q,) int64, which of the predicted positions, ascending."""
    teacher: LinearLogits
    """Its logits at these positions."""
    divergences: torch.Tensor | None = None
    """(Q,) float32, KL(teacher || model) of each with gradients, from the latest call of the model."""


class ChunkedLMLoss:
    """Loss of every predicted position; the logits of at most `chunk` positions exist at any time.

    loss_p = logsumexp_v z_pv - z_p,target(p), with z = c tanh(z / c) where the model has a soft cap c.

    Weights are used only by calling their modules, so that ZeRO-3 gathers them. Under ZeRO-3 such a call is a
    collective, and ranks predict different numbers of positions; so the number of calls never depends on the local P:

    * If `projection` is a plain `nn.Linear`, the head is called once, and within that call its projection returns the
      losses instead of the logits (`kernels.linear_cross_entropy`).
    * Any other projection (LoRA wraps it, say) is called with its head once per chunk, under activation checkpointing,
      as often as the rank with most positions may need.

    Args:
        head: hidden states (P, H) -> logits (P, V), by calling modules.
        projection: the module whose output the head returns unchanged; the head itself if it is one linear layer.
        chunk: positions per chunk, see `positions_per_chunk`.
        soft_cap: c of models that cap their logits after the head (Gemma 2); None: no cap.
    """

    def __init__(
        self,
        head: Callable[[torch.Tensor], torch.Tensor],
        projection: nn.Module,
        *,
        chunk: int,
        soft_cap: float | None = None,
    ) -> None:
        assert chunk > 0, f"chunk: found {chunk}, expected a positive number of positions"
        self._head = head
        self._projection = projection
        self._chunk = chunk
        self._soft_cap = soft_cap
        self.num_rows: int | None = None
        """The softmax covers the first `num_rows` rows of the vocabulary; None: all."""

    def __call__(
        self, hidden: torch.Tensor, targets: torch.Tensor, *, max_positions: int, weigh: Weigh | None = None
    ) -> torch.Tensor:
        """Cross-entropy of each position, times its weight.

        Args:
            hidden: (P, H) hidden states; P = 0 calls the head too, because ZeRO expects a gradient of every weight.
            targets: (P,) int64.
            max_positions: upper bound of P, equal on all ranks, such as the number of positions in the batch.
            weigh: weights from the logits of a chunk, constants of the loss; None: 1.

        Returns:
            (P,) float32.
        """
        assert len(hidden) <= max_positions, f"{len(hidden)} positions, expected at most {max_positions}"
        # The exact type: a subclass may do more than multiply by its weight.
        if type(self._projection) is not nn.Linear:
            return self._checkpointed_loss(hidden, targets, max_positions, weigh)
        if len(hidden) <= self._chunk:
            return self._unchunked_loss(hidden, targets, weigh)
        projection = self._projection

        def losses(transformed: torch.Tensor) -> torch.Tensor:
            weight, bias = self._active_rows(projection)
            return linear_cross_entropy(
                transformed, weight, bias, targets, chunk=self._chunk, soft_cap=self._soft_cap, weigh=weigh
            )

        with _replace_forward(projection, losses):
            return self._head(hidden)

    @property
    def can_distill(self) -> bool:
        """Whether the logits are those of a plain `nn.Linear`, which `linear_logits` and `distilled` need."""
        return type(self._projection) is nn.Linear

    def linear_logits(self, hidden: torch.Tensor) -> LinearLogits:
        """Logits of hidden states (Q, H) as inputs and weights of the projection, without a gradient.

        Under ZeRO-3 they keep the gathered weights alive.
        """
        projection = self._projection
        assert isinstance(projection, nn.Linear), f"found {type(projection).__name__}, expected nn.Linear"
        captured: list[LinearLogits] = []

        def capture(transformed: torch.Tensor) -> torch.Tensor:
            weight, bias = self._active_rows(projection)
            bias = None if bias is None else bias.detach()
            captured.append(LinearLogits(transformed.detach(), weight.detach(), bias))
            return transformed.new_zeros(len(transformed))

        with _replace_forward(projection, capture):
            self._head(hidden)
        return captured[0]

    def distilled(
        self, hidden: torch.Tensor, targets: torch.Tensor, distillation: Distillation, weigh: Weigh | None
    ) -> torch.Tensor:
        """As a call, but the divergence from the teacher at the positions of `distillation`: (P, H) -> (P,)."""
        projection = self._projection
        assert isinstance(projection, nn.Linear), f"found {type(projection).__name__}, expected nn.Linear"
        is_taught = torch.zeros_like(targets, dtype=torch.uint8).index_fill_(0, distillation.positions, 1)
        # Tokens first, then what is taught, each in order.
        order = is_taught.argsort(stable=True)
        tokens = order[: len(targets) - len(distillation.positions)]

        def losses(transformed: torch.Tensor) -> torch.Tensor:
            weight, bias = self._active_rows(projection)
            of_tokens = linear_cross_entropy(
                transformed.index_select(0, tokens),
                weight,
                bias,
                targets.index_select(0, tokens),
                chunk=self._chunk,
                soft_cap=self._soft_cap,
                weigh=weigh,
            )
            of_teacher = linear_divergence(
                transformed.index_select(0, distillation.positions),
                weight,
                bias,
                distillation.teacher,
                chunk=self._chunk,
                soft_cap=self._soft_cap,
            )
            return torch.cat((of_tokens, of_teacher)).index_select(0, order.argsort())

        with _replace_forward(projection, losses):
            return self._head(hidden)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """All logits of hidden states (P, H) at once, in at least float32; one call of the head."""
        logits = self._head(hidden)
        if self.num_rows is not None:
            logits = logits[:, : self.num_rows]
        # float64 stays float64.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if self._soft_cap is None else self._soft_cap * torch.tanh(logits / self._soft_cap)

    def _unchunked_loss(self, hidden: torch.Tensor, targets: torch.Tensor, weigh: Weigh | None) -> torch.Tensor:
        logits = self.logits(hidden)
        losses = functional.cross_entropy(logits, targets, reduction="none")
        return losses if weigh is None else losses * weigh(logits.detach())

    def _active_rows(self, projection: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight (V, H) and bias (V,) of the rows that can be predicted."""
        if self.num_rows is None:
            return projection.weight, projection.bias
        bias = None if projection.bias is None else projection.bias[: self.num_rows]
        return projection.weight[: self.num_rows], bias

    def _checkpointed_loss(
        self, hidden: torch.Tensor, targets: torch.Tensor, max_positions: int, weigh: Weigh | None
    ) -> torch.Tensor:
        if max_positions <= self._chunk:
            return self._unchunked_loss(hidden, targets, weigh)
        # Chunks after the last local position are empty; they still call the head in the forward and in the backward
        # pass, because the call is a collective that other ranks wait for.
        chunks = [slice(start, start + self._chunk) for start in range(0, max_positions, self._chunk)]
        losses = [checkpoint(self._unchunked_loss, hidden[c], targets[c], weigh, use_reentrant=False) for c in chunks]
        return torch.cat(losses)


@contextmanager
def _replace_forward(module: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Inside, the module computes `forward`; its hooks run as usual."""
    # A forward set on the instance, if any, hides that of the class.
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
