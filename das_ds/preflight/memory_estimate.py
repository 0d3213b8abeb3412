"""What a run takes on disk and in memory, from counts alone.

Legend: P trained and A all parameters, R ranks, m moments per parameter, w bytes of a weight in training, g bytes of a
gradient where those of one step are summed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Granularity = Literal["unit", "parameter"]

FP32 = 4
STAGE_0_BUCKET = 5 * 10**8
"""Gradients that DeepSpeed reduces together without ZeRO."""
NUM_MOMENTS = {"adamw": 2, "cpu_adam": 2, "lion": 1}
"""Optimizer -> m."""


@dataclass(frozen=True)
class ModelSize:
    """Counts of a network."""

    trained: int
    """P: all parameters, or those of LoRA."""
    total: int
    """A: all parameters, LoRA's included."""
    largest_layer: int
    """Parameters of the largest part that ZeRO-3 gathers at once."""
    num_units: int
    """Units of all layers and groups."""
    num_layers: int
    hidden: int
    inner: int
    """Neurons of an MLP that one token uses."""
    heads: int
    vocabulary: int

    @property
    def has_adapters(self) -> bool:
        """Whether the weights are frozen and LoRA is trained."""
        return self.trained < self.total


def importance_bytes(granularity: Granularity | None, *, trained: int, num_units: int) -> int:
    """One importance file: 4 bytes a unit or 1 byte a trained parameter; None: the method has none."""
    if granularity is None:
        return 0
    return trained if granularity == "parameter" else FP32 * num_units


def checkpoint_bytes(
    *, trained: int, optimizer: str, granularity: Granularity | None = None, num_units: int = 0
) -> int:
    """A checkpoint that training continues from, over all ranks: 4 P (1 + m) + importance + sums of a pass over it.

    12 bytes a trained parameter for AdamW and 8 for Lion (fp32 weight and moments), whatever the precision of training
    is; the importance that protects; and, where one is being measured, a float32 sum for each of its numbers.

    Args:
        trained: P.
        optimizer: `train.optimizer`.
        granularity: of the method's importance; None: it has none.
        num_units: units of all layers and groups, of which importance at unit level is measured.
    """
    sums = 0 if granularity is None else FP32 * (trained if granularity == "parameter" else num_units)
    importance = importance_bytes(granularity, trained=trained, num_units=num_units)
    return FP32 * trained * (1 + NUM_MOMENTS[optimizer]) + importance + sums


def domain_bytes(size: ModelSize, granularity: Granularity | None) -> int:
    """What stays of every domain: weights-only checkpoint 4 P, exported model 4 A (LoRA: also 4 P), importance."""
    adapter = FP32 * size.trained if size.has_adapters else 0
    importance = importance_bytes(granularity, trained=size.trained, num_units=size.num_units)
    return FP32 * size.trained + FP32 * size.total + adapter + importance


@dataclass(frozen=True)
class Sharding:
    """How ZeRO divides a network over the ranks."""

    stage: int
    num_ranks: int
    """R."""
    weight_bytes: int
    """w: 4 in fp32, else 2."""
    gradient_bytes: int
    """g."""
    num_moments: int
    """m."""
    offloads_optimizer: bool = False
    offloads_weights: bool = False
    bucket: int = 0
    """Gradients that are reduced together."""
    live: int = 0
    """Gathered weights that ZeRO-3 may keep."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank that do not depend on the batch: part -> bytes, where it computes and in host memory."""

    device: dict[str, int]
    host: dict[str, int]
    device_start: int
    """While the network is built, before most of the parts exist."""
    host_start: int
    host_export: int
    """On rank 0 besides, in host memory, while a model is exported."""

    @property
    def device_bytes(self) -> int:
        """The most that is needed at any time where the rank computes."""
        return max(sum(self.device.values()), self.device_start)

    @property
    def host_bytes(self) -> int:
        """The most that is needed at any time in host memory, where that is not the device."""
        return max(sum(self.host.values()), self.host_start)

    def on_cpu(self) -> MemoryEstimate:
        """The same for ranks that compute in host memory."""
        parts = {name: self.device.get(name, 0) + self.host.get(name, 0) for name in {**self.device, **self.host}}
        return MemoryEstimate(parts, {}, max(self.device_start, self.host_start), 0, self.host_export)


def memory(
    size: ModelSize,
    sharding: Sharding,
    *,
    granularity: Granularity | None,
    copied_bytes: int,
    has_own_mask: bool = False,
) -> MemoryEstimate:
    """Memory of one rank, R = 1 for what its stage does not divide.

    | part         | stage 0                | stage 1       | stage 2         | stage 3             |
    |--------------|------------------------|---------------|-----------------|---------------------|
    | weights      | w A                    | w A           | w A             | w A / R             |
    | gathered     |                        |               |                 | w max(layer, live)  |
    | fp32 weights | 4 P, fp32: the weights | 4 P / R       | 4 P / R         | 4 P / R             |
    | moments      | 4 m P                  | 4 m P / R     | 4 m P / R       | 4 m P / R           |
    | gradients    | w P, 16 bits: + 4 P    | w P + 4 P / R | (g + 4) P / R   | (g + 4) P / R       |
    | buckets      | w P, at most 5e8       | 2 w bucket    | 2 w bucket      | 2 w bucket          |
    | importance   | 6 P (parameter level)  | 6 P / R       | 6 P / R         | 6 P / R             |
    | frozen       |                        |               |                 | 4 (A - P) / R       |

    In a step gradients exist once as they were summed and once as the optimizer takes them. Importance is there twice,
    what protects and what is new, with its float32 sums; a mask of its own adds 1 P. Offload puts weights, or fp32
    weights, moments, gradients of the shard and importance, into host memory. Frozen weights of before they were
    rounded to 16 bits are always there; at other stages than 3 rank 0 has them, as part of what it collects to export
    the whole model, 4 A. Libraries and what an allocator cannot give back come on top.

    Args:
        size: of the network.
        sharding: how it is divided.
        granularity: of the importance; None: the method has none.
        copied_bytes: a checkpoint that is written from a copy in host memory, over all ranks; 0 for none.
        has_own_mask: whether single weights are masked by something else than their importance itself.
    """
    shards = sharding.num_ranks if sharding.stage >= 1 else 1
    weight_shards = sharding.num_ranks if sharding.stage == 3 else 1
    is_whole = sharding.stage == 0
    w = sharding.weight_bytes
    optimizer = {
        "fp32 weights": 0 if is_whole and w == FP32 else FP32 * size.trained // shards,
        "moments": FP32 * sharding.num_moments * size.trained // shards,
        "gradients of the shard": _sharded_gradients(size, sharding),
        "importance": (_measured_importance(size, granularity) + (size.trained if has_own_mask else 0))
        // (shards if granularity == "parameter" else 1),
    }
    weights = {"weights": w * size.total // weight_shards}
    passing = {
        "gathered weights": w * min(size.total, max(size.largest_layer, sharding.live)) if sharding.stage == 3 else 0,
        "gradients": _whole_gradients(size, sharding),
        "buckets": w * min(STAGE_0_BUCKET, size.trained) if is_whole else 2 * w * min(sharding.bucket, size.trained),
    }
    host: dict[str, int] = {"copy of a checkpoint": copied_bytes // shards}
    if sharding.stage == 3 and w != FP32 and size.has_adapters:
        host["frozen weights"] = FP32 * (size.total - size.trained) // weight_shards
    host |= optimizer if sharding.offloads_optimizer else {}
    host |= weights if sharding.offloads_weights else {}
    device = {name: part for name, part in {**weights, **passing, **optimizer}.items() if name not in host}
    # The network is read in fp32; in 16 bits the engine gets a copy of what it would round.
    start = FP32 * size.total // weight_shards
    exact = FP32 * size.trained // weight_shards if w != FP32 else 0
    return MemoryEstimate(
        device,
        host,
        device_start=0 if sharding.stage == 3 else start,
        host_start=start + exact,
        host_export=FP32 * size.total,
    )


def _measured_importance(size: ModelSize, granularity: Granularity | None) -> int:
    """While a pass over a domain ends."""
    if granularity is None:
        return 0
    numbers = size.trained if granularity == "parameter" else size.num_units
    return 2 * importance_bytes(granularity, trained=size.trained, num_units=size.num_units) + FP32 * numbers


def _whole_gradients(size: ModelSize, sharding: Sharding) -> int:
    """Gradients that a rank holds of all trained parameters."""
    if sharding.stage >= 2:
        return 0
    fp32_copy = FP32 if sharding.stage == 0 and sharding.weight_bytes != FP32 else 0
    return (sharding.weight_bytes + fp32_copy) * size.trained


def _sharded_gradients(size: ModelSize, sharding: Sharding) -> int:
    """Gradients of this rank's shard: as they are summed, where that is not done in whole ones, and for the step."""
    if sharding.stage == 0:
        return 0
    summed = sharding.gradient_bytes if sharding.stage >= 2 else 0
    return (summed + FP32) * size.trained // sharding.num_ranks


def activation_bytes(
    size: ModelSize, *, num_rows: int, num_tokens: int, weight_bytes: int, is_eager: bool, is_recomputed: bool
) -> int:
    """Rough: what the backward pass needs, rows x tokens x w x layers x (10 hidden + 4 inner [+ 2 heads x tokens]).

    Of each layer: the inputs of its maps and norms, queries, keys, values, the MLP before and after its activation.
    Only eager attention keeps its matrices, before and after dropout. With recomputation every layer keeps its input
    and one layer at a time everything.
    """
    per_layer = 10 * size.hidden + 4 * size.inner + (2 * size.heads * num_tokens if is_eager else 0)
    per_token = size.num_layers * size.hidden + per_layer if is_recomputed else size.num_layers * per_layer
    return num_rows * num_tokens * weight_bytes * per_token


def logits_bytes(size: ModelSize, *, num_positions: int, largest_chunk: int) -> int:
    """Rough: logits of a chunk in float32, their softmax and their gradient."""
    return 3 * min(FP32 * size.vocabulary * num_positions, largest_chunk)
