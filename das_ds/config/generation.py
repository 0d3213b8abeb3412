"""Self-generated text for replay: how it is sampled, and whether a run can sample and use it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from das_ds.config.section import Section

if TYPE_CHECKING:
    from das_ds.config.run import RunConfig

ReplaySource = Literal["earlier", "generated", "both"]


class GenerationConfig(Section):
    """Text that the model writes before each domain, for replay while that domain is learned."""

    num_sequences: int = Field(default=1024, ge=1)
    """Sequences of `data.sequence_length` tokens that are generated before each domain, by all ranks together."""
    temperature: float = Field(default=1.0, gt=0.0)
    """Divisor of the logits; 1 samples from the model itself, less prefers what it finds likely."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Sample from the fewest tokens that have this probability together; 1: from all."""
    prompt_tokens: int = Field(default=0, ge=0)
    """First tokens of each sequence that are taken from the training text of `general`; 0: the model begins with a new
    document. Only for causal language models."""
    batch_size: int | None = Field(default=None, ge=1)
    """Sequences per rank that are generated together; null: `train.micro_batch_size`."""
    gather_weights: bool = True
    """At ZeRO 3, gather all weights on every rank once per batch of sequences, which needs memory for the complete
    model; false: layer by layer for every token, which is slow."""


def check_generation(config: RunConfig, *, replays: bool) -> None:
    """Check the source of replayed text and how it is generated against the other sections.

    Args:
        config: of the run.
        replays: whether any global batch has room for replayed text.

    Raises:
        ValueError: text would be generated and not used, or cannot be generated.
    """
    replay = config.method.replay
    generation = replay.generation
    if replay.source == "earlier":
        if generation != GenerationConfig():
            raise ValueError(
                "method.replay.generation: found settings with method.replay.source earlier, which generates nothing; "
                "expected method.replay.source generated or both"
            )
        return
    if not replays:
        raise ValueError(
            f"method.replay.source: found {replay.source} with nothing to replay, expected method.replay.fraction"
        )
    if not generation.prompt_tokens:
        return
    if generation.prompt_tokens >= config.data.sequence_length:
        raise ValueError(
            f"method.replay.generation.prompt_tokens: found {generation.prompt_tokens}, expected fewer than "
            f"data.sequence_length, {config.data.sequence_length}"
        )
    if config.general is None or not config.general.train:
        raise ValueError(
            f"method.replay.generation.prompt_tokens: found {generation.prompt_tokens} without training text to take "
            "them from, expected general: {train: ...}"
        )
