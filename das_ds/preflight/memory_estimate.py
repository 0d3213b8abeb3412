"""Memory and disk estimate of a run, computed from sizes only.

Legend: P trained and A all parameters, R ranks, m moments per parameter, w bytes of a weight in training, g bytes of an
accumulated gradient.

`deepspeed.runtime.zero.stage3.estimate_zero3_model_states_mem_needs` covers weights, gradients and optimizer states;
this estimate adds importance, masks, LoRA, checkpoint copies, and the peaks of construction and export.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from das_ds.models.export_plan import writer_ranks
from das_ds.models.size import FP32, MemoryUse, ModelSize, Sharding

STAGE_0_BUCKET = 5 * 10**8
"""Elements that DeepSpeed reduces at once without ZeRO."""
NUM_MOMENTS = {"adamw": 2, "cpu_adam": 2, "lion": 1}
"""Optimizer -> m."""


def checkpoint_bytes(trained: int, optimizer: str) -> int:
    """A full checkpoint without the method's state, over all ranks: 4 P (1 + m).

    12 bytes per trained parameter for AdamW and 8 for Lion (fp32 weight and moments), for any training precision.

    Args:
        trained: P.
        optimizer: `train.optimizer`.
    """
    return FP32 * trained * (1 + NUM_MOMENTS[optimizer])


def domain_bytes(size: ModelSize, num_kept_moments: int = 0) -> int:
    """Disk space for every domain: checkpoint 4 P (1 + k), exported model 4 A (LoRA: also 4 P).

    Args:
        size: of the network.
        num_kept_moments: k, moments that outlive a domain.
    """
    adapter = FP32 * size.trained if size.has_adapters else 0
    return FP32 * size.trained * (1 + num_kept_moments) + FP32 * size.total + adapter


@dataclass(frozen=True)
class ExportSize:
    """An exported model."""

    total: int
    """Bytes of all its files."""
    file: int
    """Largest bytes of one file."""

    def writers(self, num_ranks: int) -> list[int]:
        """Ranks that write a file at the same time."""
        return writer_ranks(min(-(-self.total // self.file), num_ranks), num_ranks)


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
    """Additional host memory on every rank in `writers` while a model is exported."""
    writers: Sequence[int] = (0,)
    """Ranks that write exported files at the same time."""
    host_main: int = 0
    """Additional host memory on rank 0, always."""
    at_domain_start: Mapping[str, int] = field(default_factory=dict)
    """Item -> bytes on the device between two steps, while a domain starts."""
    at_domain_end: Mapping[str, int] = field(default_factory=dict)
    """Item -> bytes on the device while a domain is measured at its end."""
    host_at_domain_end: int = 0
    """Additional host memory of a rank then."""

    @property
    def device_peaks(self) -> dict[str, int]:
        """Phase -> bytes on the device."""
        return {
            "building the model": self.device_start,
            "a step": sum(self.device.values()),
            "the start of a domain": sum(self.at_domain_start.values()),
            "the end of a domain": sum(self.at_domain_end.values()),
        }

    @property
    def device_bytes(self) -> int:
        """Peak on the device."""
        return max(self.device_peaks.values())

    @property
    def host_bytes(self) -> int:
        """Peak in host memory, without what counts as device memory."""
        return max(sum(self.host.values()) + self.host_at_domain_end, self.host_start)

    def on_cpu(self) -> MemoryEstimate:
        """The estimate for ranks that compute in host memory: everything counts as device memory."""
        host_at_end = {"measurement in host memory": self.host_at_domain_end} if self.host_at_domain_end else {}
        return MemoryEstimate(
            _sum_of_items(self.device, self.host),
            {},
            max(self.device_start, self.host_start),
            0,
            self.host_export,
            self.writers,
            self.host_main,
            _sum_of_items(self.at_domain_start, self.host) if self.at_domain_start else {},
            _sum_of_items(self.at_domain_end, self.host, host_at_end) if self.at_domain_end else {},
        )


def estimate_memory(
    size: ModelSize,
    sharding: Sharding,
    *,
    method: MemoryUse,
    export: ExportSize,
    copied_bytes: int,
    copied_of_rank: int = 0,
) -> MemoryEstimate:
    """Memory of one rank; R = 1 for what its ZeRO stage does not shard.

    | item         | stage 0                | stage 1       | stage 2         | stage 3             |
    |--------------|------------------------|---------------|-----------------|---------------------|
    | weights      | w A                    | w A           | w A             | w A / R             |
    | gathered     |                        |               |                 | w max(layer, live)  |
    | fp32 weights | 4 P, fp32: the weights | 4 P / R       | 4 P / R         | 4 P / R             |
    | moments      | 4 m P                  | 4 m P / R     | 4 m P / R       | 4 m P / R           |
    | gradients    | w P, 16 bits: + 4 P    | w P + 4 P / R | w l + G / R     | w l + G / R         |
    | buckets      | w P, at most 5e8       | b w bucket    | b w bucket      | w bucket            |
    | frozen       |                        |               |                 | 4 (A - P) / R       |

    DeepSpeed allocates b buckets in full, also for a small model: two where it reduces beside the backward pass
    (`overlap_comm`) at stages 1 and 2, else one; the gradient of the largest parameter, l elements, is complete before
    it is reduced. G = (g + 4) P. During a step, gradients exist both as accumulated and as passed to
    the optimizer. Between steps there are no gradients and buckets but those that stage 3 keeps: g P / R, and its
    bucket. Offload moves weights, or fp32 weights, moments, sharded gradients and the method's state, to host memory.
    The unrounded copy of frozen weights is always in host memory; below stage 3 only rank 0 has it. While a model is
    exported a rank that writes has one file of it and the largest weight in fp32, and rank 0 afterwards the adapters.
    Libraries and fragmentation of the allocator are not included.

    Args:
        size: of the model.
        sharding: how it is sharded.
        method: memory that the method adds.
        export: the model that is exported.
        copied_bytes: of a checkpoint that is staged in host memory, over all ranks; 0 for none.
        copied_of_rank: of this rank in addition.
    """
    shards = sharding.optimizer_shards
    weight_shards = sharding.weight_shards
    is_replicated = sharding.stage == 0
    w = sharding.weight_bytes
    optimizer = {
        "fp32 weights": 0 if is_replicated and w == FP32 else FP32 * size.trained // shards,
        "moments": FP32 * sharding.num_moments * size.trained // shards,
        "gradients of the shard": _sharded_gradients(size, sharding),
        **method.optimizer,
    }
    weights = {"weights": w * size.total // weight_shards}
    temporary = {
        "gathered weights": w * min(size.total, max(size.largest_layer, sharding.live)) if sharding.stage == 3 else 0,
        "gradients": _full_gradients(size, sharding),
        "buckets": w * min(STAGE_0_BUCKET, size.trained)
        if is_replicated
        else sharding.num_buckets * w * sharding.bucket,
    }
    host: dict[str, int] = {"copy of a checkpoint": copied_bytes // shards + copied_of_rank, **method.host}
    frozen = FP32 * (size.total - size.trained) if w != FP32 else 0
    if sharding.stage == 3 and frozen:
        host["frozen weights"] = frozen // weight_shards
    host |= optimizer if sharding.offloads_optimizer else {}
    host |= weights if sharding.offloads_weights else {}
    on_device = {**weights, **temporary, **optimizer, **method.device}
    between_steps = {name: num_bytes for name, num_bytes in on_device.items() if name not in host}
    device = {**between_steps, **method.device_in_step}
    at_rest = {**between_steps, **_temporary_at_rest(size, sharding)}
    with_gradients = method.measurement == "gradients"
    # Any pass at the end of a domain gathers weights; only one that measures gradients has these.
    gathered = {"gathered weights": temporary["gathered weights"]} if method.measurement != "none" else {}
    # The model is loaded in fp32; in 16 bits the engine also gets an fp32 copy of the values before rounding.
    start = FP32 * size.total // weight_shards
    exact = FP32 * size.trained // weight_shards if w != FP32 else 0
    return MemoryEstimate(
        device,
        host,
        device_start=0 if sharding.stage == 3 else start,
        host_start=start + exact,
        host_export=max(
            min(export.file, export.total) + FP32 * max(size.largest_layer, size.largest_trained),
            FP32 * size.trained if size.has_adapters else 0,
        ),
        writers=tuple(export.writers(sharding.num_ranks)),
        host_main=0 if sharding.stage == 3 else frozen,
        at_domain_start={**at_rest, **method.device_at_start},
        at_domain_end={**(device if with_gradients else at_rest | gathered), **method.device_at_end},
        host_at_domain_end=sum(method.host_at_end.values()),
    )


def _sum_of_items(*parts: Mapping[str, int]) -> dict[str, int]:
    names = dict.fromkeys(name for items in parts for name in items)
    return {name: sum(items.get(name, 0) for items in parts) for name in names}


def _temporary_at_rest(size: ModelSize, sharding: Sharding) -> dict[str, int]:
    """What is left between steps of that which a step fills."""
    is_stage_3 = sharding.stage == 3
    gradients = 0 if sharding.offloads_optimizer else sharding.gradient_bytes * size.trained // sharding.num_ranks
    return {
        "gathered weights": 0,
        "gradients": 0,
        "gradients of the shard": gradients if is_stage_3 else 0,
        "buckets": sharding.num_buckets * sharding.weight_bytes * sharding.bucket if is_stage_3 else 0,
    }


def _full_gradients(size: ModelSize, sharding: Sharding) -> int:
    """Complete gradients on a rank: of all trained parameters, or of the one that is to be reduced."""
    if sharding.stage >= 2:
        return sharding.weight_bytes * size.largest_trained
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
