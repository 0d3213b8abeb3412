"""Generation: text that a network writes, all rows in step, so that ranks gather weights together under ZeRO-3.

Why not transformers' `generate`: it draws from a global generator, so that a sequence would depend on its batch, its
rank and on what was drawn before; and it stops rows at the end of a document, where training text goes on with the next
one. Here each row is a function of its own uniforms, and a row of S tokens takes as many calls on every rank.

Shape legend: B rows, S tokens per row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from das_ds.config import GenerationConfig, ObjectiveName
from das_ds.errors import ConfigError
from das_ds.functional.token_sampling import document_starts, ends_document, sample_tokens
from das_ds.models.language_model import Decoding, LanguageModel

POSITIONS_PER_CHUNK = 256
"""Positions whose probabilities exist at once while tokens are sampled, in float64."""


@dataclass(frozen=True)
class TokenSampler:
    """Samples tokens of a part of the vocabulary."""

    allowed: Tensor
    """(V,) bool, tokens that may be sampled; the logits may have fewer rows, or more, which are never sampled."""
    temperature: float
    top_p: float

    def __call__(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Tokens (N,) from logits (N, V), of which any number may be computed, and uniforms (N,) in [0, 1)."""
        allowed = self.allowed[: logits.shape[1]]
        allowed = nn.functional.pad(allowed, (0, logits.shape[1] - len(allowed)))
        chunks = [slice(start, start + POSITIONS_PER_CHUNK) for start in range(0, len(logits), POSITIONS_PER_CHUNK)]
        tokens = [
            sample_tokens(
                logits[chunk].masked_fill(~allowed, -torch.inf),
                uniforms[chunk],
                temperature=self.temperature,
                top_p=self.top_p,
            )
            for chunk in chunks
        ]
        return torch.cat(tokens) if tokens else torch.zeros(0, dtype=torch.int64, device=logits.device)


@dataclass(frozen=True)
class DocumentTokens:
    """How documents follow each other in a row of tokens."""

    end: int
    """Token that ends a document."""
    prefix: tuple[int, ...] = ()
    """Tokens that every document begins with."""

    @property
    def begins_with_end(self) -> bool:
        """Whether the token that ends documents begins them as well."""
        return self.prefix[:1] == (self.end,)


@torch.no_grad()
def continue_rows(
    module: nn.Module,
    network: LanguageModel,
    prompts: Tensor,
    uniforms: Tensor,
    sampler: TokenSampler,
    documents: DocumentTokens,
    *,
    isolated: bool = False,
    on_token: Callable[[int], None] = lambda position: None,
) -> Tensor:
    """Continue rows by sampled tokens, with a cache of keys and values; over the end of a document to the next.

    Args:
        module: that runs the network, in evaluation mode.
        network: a causal language model.
        prompts: (B, k) int64, the first tokens of each row, 1 <= k <= S.
        uniforms: (B, S) float64, one for each token of a row; those of tokens that are not sampled are not used.
        sampler: of the tokens.
        documents: a prefix follows each end, as in training text.
        isolated: attention does not cross documents, and positions restart; the first token of a document is drawn
            given the end of the one before it alone.
        on_token: called with every position that is reached, by all rows together.

    Returns:
        (B, S) int64.
    """
    num_rows, num_given = prompts.shape
    length = uniforms.shape[1]
    tokens = nn.functional.pad(prompts, (0, length - num_given))
    rows = torch.arange(num_rows, device=prompts.device)
    positions = torch.arange(length, device=prompts.device)
    decoding = Decoding(DynamicCache(config=network.model.config))
    # Documents that are isolated are read token by token from the start.
    first = 0
    stop = 1 if isolated else num_given
    is_start = document_starts(tokens[:, :stop], documents.end, begins_with_end=documents.begins_with_end)
    # Of the document that the latest token is in.
    starts = (is_start * positions[:stop]).amax(dim=1)
    with network.decoding(decoding):
        while stop < length:
            width = stop - first
            ends = ends_document(
                tokens[:, stop - 1], starts == stop - 1, documents.end, begins_with_end=documents.begins_with_end
            )
            position_ids = None
            if isolated:
                visible = torch.where(ends, stop - 1, starts)[:, None]
                decoding.attention_mask = (positions[:stop] >= visible).long()
                position_ids = stop - 1 - visible
            last = rows * width + width - 1
            # There are no tokens to predict; any will do.
            module(tokens[:, first:stop], last, last, position_ids)
            starts = torch.where(ends, stop, starts)
            if stop >= num_given:
                assert decoding.logits is not None, "the network was called"
                token = sampler(decoding.logits, uniforms[:, stop])
                for offset, prefix in enumerate(documents.prefix):
                    token = torch.where((starts > 0) & (stop - starts == offset), prefix, token)
                tokens[:, stop] = token
            on_token(stop)
            first = stop
            stop += 1
    return tokens


@torch.no_grad()
def infill_rows(
    module: nn.Module,
    network: LanguageModel,
    tokens: Tensor,
    groups: Tensor,
    uniforms: Tensor,
    sampler: TokenSampler,
    *,
    num_groups: int,
    mask_id: int,
) -> Tensor:
    """Sample every token of a row again, one group of positions after the other, given all others.

    One sweep of blocked Gibbs sampling from a masked language model (Wang & Cho, *BERT has a Mouth, and It Must Speak*,
    2019).

    Args:
        module: that runs the network, in evaluation mode.
        network: a masked language model.
        tokens: (B, S) int64.
        groups: (B, S) int64, group of each position; -1 where a token stays.
        uniforms: (B, S) float64.
        sampler: of the tokens.
        num_groups: equal on all ranks, which call the network once for each.
        mask_id: token that stands for those that are sampled.

    Returns:
        (B, S) int64.
    """
    tokens = tokens.clone()
    decoding = Decoding()
    with network.decoding(decoding):
        for group in range(num_groups):
            is_masked = groups == group
            positions = is_masked.flatten().nonzero().squeeze(1)
            module(tokens.masked_fill(is_masked, mask_id), positions, positions, None)
            assert decoding.logits is not None, "the network was called"
            tokens[is_masked] = sampler(decoding.logits, uniforms[is_masked])
    return tokens


def check_prompts(generation: GenerationConfig, objective: ObjectiveName) -> None:
    """Raises ConfigError for prompts of a masked language model, which writes over text of the domain."""
    if generation.prompt_tokens and objective == "mlm":
        raise ConfigError(
            f"method.replay.generation.prompt_tokens: found {generation.prompt_tokens} with objective mlm, which fills "
            "in text of the domain; allowed there: 0"
        )
