"""Cross-entropy of predicted positions without the logits of all of them.

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

    Weights are reached by calling their modules only, so that ZeRO-3 gathers them. Such a call is a collective there,
    and ranks predict different numbers of positions; so the number of calls never depends on this rank's P:

    * Where `projection` is a plain `nn.Linear`, the head is called once, and within that call its projection returns
      the losses instead of the logits (`kernels.linear_cross_entropy`).
    * Any other projection (wrapped by an adapter, say) is called with its head once per chunk, under activation
      checkpointing, as often as the rank with most positions may need.

    Args:
        head: hidden states (P, H) -> logits (P, V), by calling modules.
        projection: the module whose output the head returns as it is; the head itself where it is one linear map.
        chunk: positions per chunk, see `positions_per_chunk`.
        soft_cap: c where the model caps its logits behind the head, z <- c tanh(z / c) (Gemma 2); None: it does not.
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
        self._head, self._projection = head, projection
        self._chunk, self._soft_cap = chunk, soft_cap
        self.num_rows: int | None = None
        """The softmax is over this many first rows of the vocabulary; None: all."""

    def __call__(self, hidden: torch.Tensor, targets: torch.Tensor, *, max_positions: int) -> torch.Tensor:
        """Cross-entropy of each position.

        Args:
            hidden: (P, H) hidden states; P = 0 calls the head too, as ZeRO waits for the gradient of every weight.
            targets: (P,) int64.
            most_positions: P at most on any rank, equal on all of them, such as the number of positions in the batch.

        Returns:
            (P,) float32.
        """
        assert len(hidden) <= max_positions, f"{len(hidden)} positions, expected at most {max_positions}"
        # A subclass may do more than multiply by its weight.
        if type(self._projection) is not nn.Linear:
            return self._by_checkpoints(hidden, targets, max_positions)
        if len(hidden) <= self._chunk:
            return self._direct(hidden, targets)
        projection = self._projection

        def losses(transformed: torch.Tensor) -> torch.Tensor:
            weight, bias = self._in_force(projection)
            return linear_cross_entropy(transformed, weight, bias, targets, chunk=self._chunk, soft_cap=self._soft_cap)

        with _forward_replaced(projection, losses):
            return self._head(hidden)

    def _direct(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self._head(hidden)
        if self.num_rows is not None:
            logits = logits[:, : self.num_rows]
        # Not below float32; float64 stays.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self._soft_cap is not None:
            logits = self._soft_cap * torch.tanh(logits / self._soft_cap)
        return functional.cross_entropy(logits, targets, reduction="none")

    def _in_force(self, projection: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight, bias = projection.weight, projection.bias
        if self.num_rows is None:
            return weight, bias
        return weight[: self.num_rows], None if bias is None else bias[: self.num_rows]

    def _by_checkpoints(self, hidden: torch.Tensor, targets: torch.Tensor, max_positions: int) -> torch.Tensor:
        if max_positions <= self._chunk:
            return self._direct(hidden, targets)
        # Chunks behind the last position are empty and yet computed again in the backward pass, as on other ranks.
        parts = [slice(first, first + self._chunk) for first in range(0, max_positions, self._chunk)]
        return torch.cat([checkpoint(self._direct, hidden[p], targets[p], use_reentrant=False) for p in parts])


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """The module computes `forward` inside, its hooks as ever."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
