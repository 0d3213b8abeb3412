"""Memory and disk estimate of a run, computed from sizes alone.

Legend: P trained and A all parameters, R ranks, m moments per parameter, w bytes of a weight in training, g bytes of an
accumulated gradient.

`deepspeed.runtime.zero.stage3.estimate_zero3_model_states_mem_needs` covers weights, gradients and optimizer states;
this estimate adds importance, masks, LoRA, checkpoint copies, and the peaks of construction and export.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Granularity = Literal["unit", "parameter"]

FP32 = 4
STAGE_0_BUCKET = 5 * 10**8
"""Elements that DeepSpeed reduces at once without ZeRO."""
NUM_MOMENTS = {"adamw": 2, "cpu_adam": 2, "lion": 1}
"""Optimizer -> m."""


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model."""

    trained: int
    """P: all parameters, or those of LoRA."""
    total: int
    """A: all parameters, LoRA's included."""
    largest_layer: int
    """Parameters of the largest module that ZeRO-3 gathers at once."""
    num_units: int
    """Units of all layers and unit groups."""
    num_layers: int
    hidden: int
    inner: int
    """MLP neurons that one token uses."""
    heads: int
    vocabulary: int

    @property
    def has_adapters(self) -> bool:
        """Whether only LoRA is trained and the other weights are frozen."""
        return self.trained < self.total


def importance_bytes(granularity: Granularity | None, *, trained: int, num_units: int) -> int:
    """One importance file: 4 bytes per unit or 1 byte per trained parameter; None: the method has none."""
    if granularity is None:
        return 0
    return trained if granularity == "parameter" else FP32 * num_units


def checkpoint_bytes(
    *, trained: int, optimizer: str, granularity: Granularity | None = None, num_units: int = 0
) -> int:
    """A full checkpoint, over all ranks: 4 P (1 + m) + importance + sums of an importance measurement.

    12 bytes per trained parameter for AdamW and 8 for Lion (fp32 weight and moments), regardless of the training
    precision; the accumulated importance; and a float32 sum per value while importance is being measured.

    Args:
        trained: P.
        optimizer: `train.optimizer`.
        granularity: of the method's importance; None: it has none.
        num_units: units of all layers and unit groups, for importance of units.
    """
    sums = 0 if granularity is None else FP32 * (trained if granularity == "parameter" else num_units)
    importance = importance_bytes(granularity, trained=trained, num_units=num_units)
    return FP32 * trained * (1 + NUM_MOMENTS[optimizer]) + importance + sums


def domain_bytes(size: ModelSize, granularity: Granularity | None) -> int:
    """Files kept for every domain: weights-only checkpoint 4 P, exported model 4 A (LoRA: also 4 P), importance."""
    adapter = FP32 * size.trained if size.has_adapters else 0
    importance = importance_bytes(granularity, trained=size.trained, num_units=size.num_units)
    return FP32 * size.trained + FP32 * size.total + adapter + importance


@dataclass(frozen=True)
class Sharding:
    """How ZeRO shards a model over the ranks."""

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
    """Elements that are reduced at once."""
    live: int = 0
    """Gathered parameters that ZeRO-3 may keep."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank that do not depend on the batch."""

    device: dict[str, int]
    """Item -> bytes on the device that computes."""
    host: dict[str, int]
    """Item -> bytes in host memory."""
    device_start: int
    """While the model is built, before most items exist."""
    host_start: int
    host_export: int
    """Additional host memory on rank 0 while a model is exported."""

    @property
    def device_bytes(self) -> int:
        """Peak on the device."""
        return max(sum(self.device.values()), self.device_start)

    @property
    def host_bytes(self) -> int:
        """Peak in host memory, without what counts as device memory."""
        return max(sum(self.host.values()), self.host_start)

    def on_cpu(self) -> MemoryEstimate:
        """The same for ranks that compute in host memory: everything counts as device memory."""
        items = {name: self.device.get(name, 0) + self.host.get(name, 0) for name in {**self.device, **self.host}}
        return MemoryEstimate(items, {}, max(self.device_start, self.host_start), 0, self.host_export)


def estimate_memory(
    size: ModelSize,
    sharding: Sharding,
    *,
    granularity: Granularity | None,
    copied_bytes: int,
    has_own_mask: bool = False,
) -> MemoryEstimate:
    """Memory of one rank; R = 1 for what its ZeRO stage does not shard.

    | item         | stage 0                | stage 1       | stage 2         | stage 3             |
    |--------------|------------------------|---------------|-----------------|---------------------|
    | weights      | w A                    | w A           | w A             | w A / R             |
    | gathered     |                        |               |                 | w max(layer, live)  |
    | fp32 weights | 4 P, fp32: the weights | 4 P / R       | 4 P / R         | 4 P / R             |
    | moments      | 4 m P                  | 4 m P / R     | 4 m P / R       | 4 m P / R           |
    | gradients    | w P, 16 bits: + 4 P    | w P + 4 P / R | (g + 4) P / R   | (g + 4) P / R       |
    | buckets      | w P, at most 5e8       | 2 w bucket    | 2 w bucket      | 2 w bucket          |
    | importance   | 6 P (parameter level)  | 6 P / R       | 6 P / R         | 6 P / R             |
    | frozen       |                        |               |                 | 4 (A - P) / R       |

    During a step, gradients exist both as accumulated and as passed to the optimizer. Importance exists twice
    (accumulated and new), with its float32 sums; a separate mask adds 1 P. Offload moves weights, or fp32 weights,
    moments, sharded gradients and importance, to host memory. The unrounded copy of frozen weights is always in host
    memory; below stage 3 only rank 0 has it, as part of the complete model that it exports, 4 A. Libraries and
    fragmentation of the allocator are not included.

    Args:
        size: of the model.
        sharding: how it is sharded.
        granularity: of the importance; None: the method has none.
        copied_bytes: of a checkpoint that is staged in host memory, over all ranks; 0 for none.
        has_own_mask: whether weights are masked by anything but the importance itself.
    """
    shards = sharding.num_ranks if sharding.stage >= 1 else 1
    weight_shards = sharding.num_ranks if sharding.stage == 3 else 1
    is_replicated = sharding.stage == 0
    w = sharding.weight_bytes
    optimizer = {
        "fp32 weights": 0 if is_replicated and w == FP32 else FP32 * size.trained // shards,
        "moments": FP32 * sharding.num_moments * size.trained // shards,
        "gradients of the shard": _sharded_gradients(size, sharding),
        "importance": (_measured_importance(size, granularity) + (size.trained if has_own_mask else 0))
        // (shards if granularity == "parameter" else 1),
    }
    weights = {"weights": w * size.total // weight_shards}
    temporary = {
        "gathered weights": w * min(size.total, max(size.largest_layer, sharding.live)) if sharding.stage == 3 else 0,
        "gradients": _full_gradients(size, sharding),
        "buckets": w * min(STAGE_0_BUCKET, size.trained)
        if is_replicated
        else 2 * w * min(sharding.bucket, size.trained),
    }
    host: dict[str, int] = {"copy of a checkpoint": copied_bytes // shards}
    if sharding.stage == 3 and w != FP32 and size.has_adapters:
        host["frozen weights"] = FP32 * (size.total - size.trained) // weight_shards
    host |= optimizer if sharding.offloads_optimizer else {}
    host |= weights if sharding.offloads_weights else {}
    items = {**weights, **temporary, **optimizer}
    device = {name: num_bytes for name, num_bytes in items.items() if name not in host}
    # The model is loaded in fp32; in 16 bits the engine also gets an fp32 copy of the values before rounding.
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
    """Peak at the end of a measurement: accumulated and new importance, and float32 sums."""
    if granularity is None:
        return 0
    num_values = size.trained if granularity == "parameter" else size.num_units
    return 2 * importance_bytes(granularity, trained=size.trained, num_units=size.num_units) + FP32 * num_values


def _full_gradients(size: ModelSize, sharding: Sharding) -> int:
    """Unsharded gradients that a rank holds."""
    if sharding.stage >= 2:
        return 0
    fp32_copy = FP32 if sharding.stage == 0 and sharding.weight_bytes != FP32 else 0
    return (sharding.weight_bytes + fp32_copy) * size.trained


def _sharded_gradients(size: ModelSize, sharding: Sharding) -> int:
    """Gradients of this rank's shard: as accumulated, unless in unsharded ones, and as passed to the optimizer."""
    if sharding.stage == 0:
        return 0
    summed = sharding.gradient_bytes if sharding.stage >= 2 else 0
    return (summed + FP32) * size.trained // sharding.num_ranks


def activation_bytes(
    size: ModelSize, *, num_rows: int, num_tokens: int, weight_bytes: int, is_eager: bool, is_recomputed: bool
) -> int:
    """Rough estimate: rows x tokens x w x layers x (10 hidden + 4 inner [+ 2 heads x tokens]).

    Each layer keeps the inputs of its linear layers and norms, queries, keys, values, and the MLP before and after its
    activation. Only eager attention keeps its matrices, before and after dropout. With recomputation every layer keeps
    its input, and one layer at a time keeps everything.
    """
    per_layer = 10 * size.hidden + 4 * size.inner + (2 * size.heads * num_tokens if is_eager else 0)
    per_token = size.num_layers * size.hidden + per_layer if is_recomputed else size.num_layers * per_layer
    return num_rows * num_tokens * weight_bytes * per_token


def logits_bytes(size: ModelSize, *, num_positions: int, largest_chunk: int) -> int:
    """Rough estimate: logits of a chunk in float32, their softmax and their gradient."""
    return 3 * min(FP32 * size.vocabulary * num_positions, largest_chunk)
