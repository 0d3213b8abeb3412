"""What generated text costs a run: memory, disk space and time, roughly."""

from __future__ import annotations

import math

from das_ds.config import ObjectiveName, RunConfig
from das_ds.models.flops import StepFlops
from das_ds.models.size import MemoryUse, ModelSize, Sharding

TOKEN_BYTES = 4
"""Bytes of a generated token: at most on disk, and in checkpoints while text is generated."""
MEMORY_BANDWIDTH = 1e12
"""Bytes per second of weights that a GPU is taken to read while it generates a token, half of what an A100's memory
gives: the products are too small to do better."""


def generates(config: RunConfig) -> bool:
    """Whether a run generates text."""
    return any(config.replays_generated(domain.name) for domain in config.domains)


def generation_memory(config: RunConfig, size: ModelSize, sharding: Sharding, objective: ObjectiveName) -> MemoryUse:
    """Keys and values of the sequences of a batch, at ZeRO 3 all weights, and the text itself.

    Keys and values are counted for as many heads as there are queries, the most that there can be.
    """
    generation = config.method.replay.generation
    length = config.data.sequence_length
    device = {}
    if objective == "clm":
        positions = _batch_size(config) * length
        device["keys and values"] = 2 * positions * size.num_layers * size.hidden * sharding.weight_bytes
    if sharding.stage == 3 and generation.gather_weights:
        device["gathered weights"] = size.total * sharding.weight_bytes
    text = generation.num_sequences * length * TOKEN_BYTES
    return MemoryUse(device_at_start=device, checkpoint=text, domain=text)


def generation_seconds(
    config: RunConfig,
    size: ModelSize,
    sharding: Sharding,
    objective: ObjectiveName,
    *,
    flops: StepFlops,
    rate: float,
    gather_seconds: float,
) -> float:
    """Time of the text of one domain.

    A decoder reads all weights for every token of a batch; an encoder reads a sequence once for each group of masked
    tokens.

    Args:
        config, size, sharding, objective: of the run.
        flops: of a step of plain training.
        rate: operations per second of all ranks.
        gather_seconds: for which ZeRO 3 gathers all weights; 0 at other stages.
    """
    generation = config.method.replay.generation
    num_batches = math.ceil(generation.num_sequences / (sharding.num_ranks * _batch_size(config)))
    if objective == "clm":
        num_passes = num_batches * config.data.sequence_length
        seconds = num_passes * size.total * sharding.weight_bytes / MEMORY_BANDWIDTH
    else:
        num_groups = math.ceil(1 / config.data.mlm_probability)
        num_passes = num_batches * num_groups
        seconds = num_groups * generation.num_sequences / config.train.global_batch_size * flops.forward / rate
    return seconds + gather_seconds * (num_batches if generation.gather_weights else num_passes)


def _batch_size(config: RunConfig) -> int:
    """Sequences that a rank generates together, at most."""
    return config.method.replay.generation.batch_size or config.train.micro_batch_size
