"""EAFT: entropy-adaptive fine-tuning, which trains less on tokens where the model is sure of itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from das_ds.config import MethodConfig
from das_ds.functional.losses import top_k_entropy
from das_ds.methods.base import Losses, Method

if TYPE_CHECKING:
    from das_ds.data.batch import Batch


class EaftConfig(MethodConfig):
    """Entropy-adaptive fine-tuning: the loss of each token times the entropy of the model's prediction there."""

    name: Literal["eaft"] = "eaft"
    top_k: int = Field(default=20, ge=2)
    """Most likely tokens that the entropy is computed from."""
    exponent: float = Field(default=1.0, ge=0.0)
    """Power of the entropy in the weight of a token: above 1 confident predictions count even less, 0 is naive
    training."""


class EAFT(Method[EaftConfig]):
    """Entropy-adaptive fine-tuning (Diao et al., *Entropy-Adaptive Fine-Tuning: Resolving Confident Conflicts to
    Mitigate Forgetting*, 2026, arXiv 2601.02151):

        L = (1/N) sum_p w_p l_p        w_p = H_p^a        H_p = -(1 / ln K) sum_k q_pk ln q_pk, without a gradient

    over the N predicted tokens of the global batch, l_p being the cross-entropy of one and q_p the model's
    probabilities of the K most likely tokens there, renormalized (`functional.losses.top_k_entropy`). A token that the
    model is sure of changes little, above all where the text contradicts it. K = 20 and a = 1 are the defaults of
    LLaMA-Factory and Axolotl. Weights are not normalized over the batch, so that the loss is smaller than that of
    naive training.

    Keeps nothing in memory. Extra compute: the K largest of the logits that exist anyway, chunk by chunk; Liger's
    kernel, which shows no logits, is not used.
    """

    Config = EaftConfig

    @contextmanager
    def losses(self, batch: Batch, token_scale: torch.Tensor) -> Iterator[Losses]:
        """The weighted pre-training loss."""
        _, losses = self.run.engine(
            batch.corrupted_ids, batch.predicted, batch.targets, batch.position_ids, self._weigh
        )
        yield {self.run.objective: losses.sum() * token_scale}

    def _weigh(self, logits: torch.Tensor) -> torch.Tensor:
        """(P, V) -> (P,)."""
        return top_k_entropy(logits, self.settings.top_k) ** self.settings.exponent
