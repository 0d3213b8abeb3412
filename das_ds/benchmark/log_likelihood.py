"""Log-likelihood of choices under a model.

A decoder gives log p(choice | context): the sum of the log-probabilities of the choice's tokens, each after those
before it. An encoder gives the pseudo-log-likelihood (Salazar et al., *Masked Language Model Scoring*, ACL 2020): each
token of the choice is masked in turn, all others are read, also those after it, and the log-probabilities of the masked
tokens are added. That is no probability of the choice, and not comparable with a decoder's.

Shape legend: P predictions of a batch, T tokens of all choices, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from das_ds.benchmark.benchmarks import Benchmark
from das_ds.benchmark.encoding import ChoiceEncoder, EncodedChoice
from das_ds.benchmark.rows import BatchTensors, Row, build_causal_rows, build_masked_rows, compose_batches
from das_ds.benchmark.rules import ScoredChoice
from das_ds.distributed.collectives import all_reduce_sum
from das_ds.distributed.process_group import RankInfo
from das_ds.errors import DataError, ModelError
from das_ds.models.architectures.spec import ArchitectureSpec
from das_ds.models.lm_loss import positions_per_chunk
from das_ds.progress import Progress


@dataclass(frozen=True)
class ScoredItems:
    """The choices of a benchmark's items with their probabilities."""

    items: list[list[ScoredChoice]]
    num_truncated: int
    """Choices whose context was cut."""


class ChoiceScorer:
    """Scores choices with one model.

    Args:
        model: in evaluation mode; moved to the rank's device.
        spec: its architecture spec.
        tokenizer: of the model.
        info: this rank.
        batch_size: rows per forward pass.
        logits_mib: largest chunk of logits in MiB.

    Raises:
        ModelError: an encoder's tokenizer without mask token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        spec: ArchitectureSpec,
        tokenizer: PreTrainedTokenizerBase,
        info: RankInfo,
        *,
        batch_size: int,
        logits_mib: int,
    ) -> None:
        if spec.objective == "mlm" and tokenizer.mask_token_id is None:
            raise ModelError(
                f"tokenizer of {tokenizer.name_or_path}: found no mask token, by which encoders score choices"
            )
        module: nn.Module = model
        module.to(info.device)
        self._base: Any = model.base_model
        self._head = spec.head(model)
        self._soft_cap = spec.logit_cap(model)
        self._is_causal = spec.objective == "clm"
        self._info = info
        self._batch_size = batch_size
        self._chunk = positions_per_chunk(model.config.get_text_config().vocab_size, logits_mib)
        self._max_length = spec.max_sequence_length(model)
        self._encoder = ChoiceEncoder(tokenizer, spec.objective, self._max_length)
        # Some encoders find their positions by the padding token of their config.
        padding_ids = (model.config.pad_token_id, tokenizer.pad_token_id)
        self._padding_id: int = next((token for token in padding_ids if token is not None), 0)
        self._mask_id: int = tokenizer.mask_token_id or 0

    @torch.no_grad()
    def score(self, benchmark: Benchmark, label: str) -> ScoredItems:
        """Probabilities of all choices, equal on every rank; a collective.

        Args:
            benchmark: the items.
            label: in front of the progress bar.

        Raises:
            DataError: a choice that the model cannot read.
            ModelError: a probability is not finite.
        """
        contexts = [context for item in benchmark.items for context in item.contexts]
        texts = [continuation for item in benchmark.items for continuation in item.continuations]
        try:
            encoded = list(self._encoder.encode(contexts, texts))
        except DataError as error:
            raise DataError(f"benchmark {benchmark.name}: {error}") from error
        counts = [choice.stop - choice.start for choice in encoded]
        tokens = self._predict_all(self._build_rows(encoded), sum(counts), label)
        if not tokens.isfinite().all():
            raise ModelError(
                f"benchmark {benchmark.name}: found a probability that is not finite, expected numbers only"
            )
        sums = (part.sum(dim=1).tolist() for part in tokens.split(counts, dim=1))
        choices = (
            ScoredChoice(text, count, log_likelihood, num_greedy == count)
            for text, count, (log_likelihood, num_greedy) in zip(texts, counts, sums, strict=True)
        )
        items = [[next(choices) for _ in item.continuations] for item in benchmark.items]
        return ScoredItems(items, sum(choice.is_truncated for choice in encoded))

    def _build_rows(self, encoded: Sequence[EncodedChoice]) -> list[Row]:
        return build_causal_rows(encoded) if self._is_causal else build_masked_rows(encoded, self._mask_id)

    def _predict_all(self, rows: Sequence[Row], num_tokens: int, label: str) -> torch.Tensor:
        """(2, T) float64 on the host: log-probability of each token, and 1 where no other is more probable."""
        batches = compose_batches(rows, self._batch_size, self._max_length)
        own = batches[self._info.rank :: self._info.world_size]
        tokens = torch.zeros(2, num_tokens, dtype=torch.float64, device=self._info.device)
        for batch in Progress(own, label, len(own), unit="batches", show=self._info.is_main):
            tensors = batch.tensors(self._padding_id, self._mask_id).to(self._info.device)
            tokens[:, tensors.slots] = self._predict(tensors).double()
        # Each token is predicted on one rank and 0 on the others, so that the sum is exact.
        return all_reduce_sum(tokens).cpu()

    def _predict(self, batch: BatchTensors) -> torch.Tensor:
        """(2, P) float32, as `_predict_all`."""
        # A causal model sees no padding that comes after its text.
        options = {"use_cache": False} if self._is_causal else {"attention_mask": batch.is_token}
        hidden = self._base(input_ids=batch.input_ids, **options).last_hidden_state
        chosen = hidden.flatten(0, 1).index_select(0, batch.predicted)
        chunks = zip(chosen.split(self._chunk), batch.targets.split(self._chunk), strict=True)
        return torch.cat([self._read_logits(part, targets) for part, targets in chunks], dim=1)

    def _read_logits(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Predictions (2, P) of hidden states (P, H) for targets (P,)."""
        logits = hidden
        for module in self._head:
            logits = module(logits)
        logits = logits.float()
        if self._soft_cap is not None:
            logits = self._soft_cap * torch.tanh(logits / self._soft_cap)
        log_probs = logits.log_softmax(dim=-1)  # (P, V)
        target_log_probs = log_probs.gather(1, targets[:, None]).squeeze(1)
        return torch.stack((target_log_probs, (log_probs.argmax(dim=-1) == targets).float()))
