"""LM loss in chunks: the cross-entropy of the predicted positions without the logits of all of them at once.

Shape legend: P predicted positions of this rank, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from das_ds.kernels.linear_cross_entropy import linear_cross_entropy

MIB = 2**20


def positions_per_chunk(vocab_size: int, logits_mib: int) -> int:
    """Positions whose float32 logits fill `logits_mib` MiB; at least one."""
    return max(1, logits_mib * MIB // (torch.float32.itemsize * vocab_size))


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

    def __call__(self, hidden: torch.Tensor, targets: torch.Tensor, *, max_positions: int) -> torch.Tensor:
        """Cross-entropy of each position.

        Args:
            hidden: (P, H) hidden states; P = 0 calls the head too, because ZeRO expects a gradient of every weight.
            targets: (P,) int64.
            max_positions: upper bound of P, equal on all ranks, such as the number of positions in the batch.

        Returns:
            (P,) float32.
        """
        assert len(hidden) <= max_positions, f"{len(hidden)} positions, expected at most {max_positions}"
        # The exact type: a subclass may do more than multiply by its weight.
        if type(self._projection) is not nn.Linear:
            return self._checkpointed_loss(hidden, targets, max_positions)
        if len(hidden) <= self._chunk:
            return self._unchunked_loss(hidden, targets)
        projection = self._projection

        def losses(transformed: torch.Tensor) -> torch.Tensor:
            weight, bias = self._active_rows(projection)
            return linear_cross_entropy(transformed, weight, bias, targets, chunk=self._chunk, soft_cap=self._soft_cap)

        with _replace_forward(projection, losses):
            return self._head(hidden)

    def _unchunked_loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self._head(hidden)
        if self.num_rows is not None:
            logits = logits[:, : self.num_rows]
        # At least float32; float64 stays float64.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self._soft_cap is not None:
            logits = self._soft_cap * torch.tanh(logits / self._soft_cap)
        return functional.cross_entropy(logits, targets, reduction="none")

    def _active_rows(self, projection: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight (V, H) and bias (V,) of the rows that can be predicted."""
        if self.num_rows is None:
            return projection.weight, projection.bias
        bias = None if projection.bias is None else projection.bias[: self.num_rows]
        return projection.weight[: self.num_rows], bias

    def _checkpointed_loss(self, hidden: torch.Tensor, targets: torch.Tensor, max_positions: int) -> torch.Tensor:
        if max_positions <= self._chunk:
            return self._unchunked_loss(hidden, targets)
        # Chunks after the last local position are empty; they still call the head in the forward and in the backward
        # pass, because the call is a collective that other ranks wait for.
        chunks = [slice(start, start + self._chunk) for start in range(0, max_positions, self._chunk)]
        losses = [checkpoint(self._unchunked_loss, hidden[c], targets[c], use_reentrant=False) for c in chunks]
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
