"""Plan of a run on GPUs that need not exist: memory, traffic, time and cost, from the config alone.

Memory is the estimate of preflight, traffic that of `preflight.traffic`. Time is the larger of two bounds: operations
at a stated share of the GPUs' peak (MFU), and traffic at stated bandwidths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from das_ds.config import RunConfig
from das_ds.config.deepspeed import EngineConfig, build_engine_config
from das_ds.methods import method_measured_sequences, method_memory, method_step_use
from das_ds.models.loading import find_spec
from das_ds.models.size import Collective, Measurement, MemoryUse, Sharding, StepUse
from das_ds.preflight.cluster import Cluster
from das_ds.preflight.generation import generates, generation_seconds
from das_ds.preflight.memory import (
    DiskUse,
    activation_estimate,
    disk_use,
    estimate_run_memory,
    export_size,
    forward_estimate,
    zero_sharding,
)
from das_ds.preflight.memory_estimate import MemoryEstimate
from das_ds.preflight.planned_model import PlannedModel
from das_ds.preflight.traffic import bytes_sent, forward_collectives, step_collectives

HEADROOM = 0.1
"""Share of a GPU's memory left to libraries (CUDA context, NCCL, workspaces) and to what the allocator cannot use."""
MEASUREMENT_PASSES: dict[Measurement, float] = {"none": 0.0, "forward": 1 / 3, "backward": 1.0, "gradients": 1.0}
"""What a method runs over its sample -> its share of the operations of training on it."""
MEASUREMENT_GATHERS: dict[Measurement, int] = {"none": 0, "forward": 1, "backward": 2, "gradients": 2}
"""The same -> how often ZeRO 3 gathers the weights for a micro-batch."""
GIB = 2**30


@dataclass(frozen=True)
class DomainPlan:
    """A stage of the run."""

    name: str
    steps: int
    tokens: int
    seconds: float
    """Of its steps, what is generated and what the method measures before and after them, and the exported model."""
    measured_seconds: float
    """Of what is generated, and of what the method measures."""
    gpu_hours: float
    cost: float | None


@dataclass(frozen=True)
class Plan:
    """A run on a number of GPUs."""

    num_gpus: int
    zero_stage: int
    micro_steps: int
    memory: MemoryEstimate
    activations: int
    """Of a rank in a step."""
    peaks: dict[str, int]
    """Phase -> bytes on a GPU, activations included."""
    host_per_node: int
    """Bytes of host memory on the node of rank 0."""
    disk: DiskUse
    collectives: tuple[Collective, ...]
    """Of a step."""
    flops: int
    """Of a step and all ranks, as they are executed but for recomputation."""
    compute_seconds: float
    traffic_seconds: float
    tokens_per_step: int
    domains: tuple[DomainPlan, ...]

    @property
    def peak(self) -> int:
        """Bytes on a GPU when most are in use."""
        return max(self.peaks.values())

    @property
    def step_seconds(self) -> float:
        """A step whose traffic runs beside its operations."""
        return max(self.compute_seconds, self.traffic_seconds)

    @property
    def gpu_hours(self) -> float:
        """Of all domains."""
        return sum(domain.gpu_hours for domain in self.domains)

    def fits(self, cluster: Cluster) -> bool:
        """Whether GPUs and, where it is known, host memory suffice."""
        is_enough = self.peak <= (1 - HEADROOM) * cluster.memory_gib * GIB
        return is_enough and self.host_fits(cluster) is not False

    def host_fits(self, cluster: Cluster) -> bool | None:
        """Whether a node's host memory suffices; None: it is unknown."""
        if cluster.host_memory_gib is None:
            return None
        return self.host_per_node <= (1 - HEADROOM) * cluster.host_memory_gib * GIB


def plan_run(config: RunConfig, model: PlannedModel, cluster: Cluster, num_gpus: int) -> Plan:
    """Plan a run on so many GPUs.

    Args:
        config: the run.
        model: its network.
        cluster: what the GPUs are.
        num_gpus: ranks.

    Raises:
        ConfigError: a number of GPUs that the nodes, the batch sizes or DeepSpeed's settings do not allow, or a domain
            whose length is in epochs, which depend on its text.
    """
    cluster.check_gpus(num_gpus)
    engine = build_engine_config(config, num_gpus)
    sharding = zero_sharding(config, engine, num_gpus)
    use = method_memory(config, model.size, sharding)
    step = method_step_use(config, model.size, sharding)
    memory = estimate_run_memory(config, model.size, engine, num_gpus)
    activations = activation_estimate(config, model.size)
    collectives = step_collectives(
        model.weights, sharding, engine, step, is_recomputed=config.model.gradient_checkpointing
    )
    flops = _executed_flops(config, model, use, step)
    rate = cluster.mfu * cluster.peak * num_gpus
    traffic = sum(bytes_sent(collective, num_gpus) for collective in collectives)
    compute_seconds = flops / rate
    traffic_seconds = traffic / cluster.bandwidth(num_gpus)
    ranks_of_node = min(num_gpus, cluster.gpus_per_node)
    tokens = config.train.global_batch_size * config.data.sequence_length
    measured = _measured_seconds(config, model, use.measurement, rate, sharding, engine, cluster)
    return Plan(
        num_gpus=num_gpus,
        zero_stage=engine.zero_stage,
        micro_steps=_micro_steps(engine),
        memory=memory,
        activations=activations,
        peaks=_peaks(config, model, memory, activations, use),
        host_per_node=_host_per_node(memory, ranks_of_node),
        disk=disk_use(config, model.size, num_gpus),
        collectives=tuple(collectives),
        flops=flops,
        compute_seconds=compute_seconds,
        traffic_seconds=traffic_seconds,
        tokens_per_step=tokens,
        domains=_domains(config, model, cluster, num_gpus, max(compute_seconds, traffic_seconds), measured),
    )


def _host_per_node(memory: MemoryEstimate, ranks_of_node: int) -> int:
    """Host memory of the first node, which has rank 0 and most of those that write a model."""
    num_writers = sum(rank < ranks_of_node for rank in memory.writers)
    return ranks_of_node * memory.host_bytes + memory.host_main + num_writers * memory.host_export


def _micro_steps(engine: EngineConfig) -> int:
    return int(engine.raw["gradient_accumulation_steps"])


def _peaks(
    config: RunConfig, model: PlannedModel, memory: MemoryEstimate, activations: int, use: MemoryUse
) -> dict[str, int]:
    """Phase -> bytes; passes without gradients have the activations of one layer at a time.

    What a method has only in a step is there after the backward pass, when activations are gone.
    """
    in_phase = {"a step": max(activations - sum(use.device_in_step.values()), 0)}
    if use.measurement == "forward":
        in_phase["the end of a domain"] = forward_estimate(config, model.size)
    elif use.measurement != "none":
        in_phase["the end of a domain"] = activations
    return {phase: num_bytes + in_phase.get(phase, 0) for phase, num_bytes in memory.device_peaks.items()}


def _executed_flops(config: RunConfig, model: PlannedModel, use: MemoryUse, step: StepUse) -> int:
    """Operations of a step over all ranks: plain training, rows and passes of the method, and the method's own."""
    plain = model.flops
    extra_rows = use.extra_rows / config.train.micro_batch_size
    body = plain.body + plain.attention
    return plain.total + round(extra_rows * body) + round(step.forward_rows * plain.forward) + step.flops


def _measured_seconds(
    config: RunConfig,
    model: PlannedModel,
    measurement: Measurement,
    rate: float,
    sharding: Sharding,
    engine: EngineConfig,
    cluster: Cluster,
) -> list[float]:
    """Of what the method measures before and after each domain, the larger of operations and gathered weights, and of
    the text that is generated before it."""
    num_ranks = sharding.num_ranks
    sample = config.method.sample_size
    rows = num_ranks * ((sample and sample.batch_size) or config.train.micro_batch_size)
    gathered = sum(bytes_sent(item, num_ranks) for item in forward_collectives(model.weights, sharding, engine))
    seconds = max(
        MEASUREMENT_PASSES[measurement] * model.flops.total / config.train.global_batch_size / rate,
        MEASUREMENT_GATHERS[measurement] * gathered / rows / cluster.bandwidth(num_ranks),
    )
    found = method_measured_sequences(config, model.size, num_ranks)
    first = found.before_later if config.num_earlier else found.before_first
    own = config.own_stages
    before = [first, *[found.before_later] * (len(own) - 1)]
    measured = [seconds * (num_sequences + found.after) for num_sequences in before]
    if not generates(config):
        return measured
    text_seconds = generation_seconds(
        config,
        model.size,
        sharding,
        find_spec(config.model).objective,
        flops=model.flops,
        rate=rate,
        gather_seconds=gathered / cluster.bandwidth(num_ranks),
    )
    generated = [text_seconds * config.replays_generated(stage.last_domain) for stage in own]
    return [sum(both) for both in zip(measured, generated, strict=True)]


def _domains(
    config: RunConfig,
    model: PlannedModel,
    cluster: Cluster,
    num_gpus: int,
    step_seconds: float,
    measured_seconds: Sequence[float],
) -> tuple[DomainPlan, ...]:
    tokens = config.train.global_batch_size * config.data.sequence_length
    size = export_size(config, model.size)
    export = size.total / len(size.writers(num_gpus)) / cluster.disk
    planned = []
    for stage, measured in zip(config.own_stages, measured_seconds, strict=True):
        seconds = stage.num_steps * step_seconds + measured + export
        gpu_hours = num_gpus * seconds / 3600
        cost = None if cluster.price is None else cluster.price * gpu_hours
        planned.append(
            DomainPlan(stage.name, stage.num_steps, stage.num_steps * tokens, seconds, measured, gpu_hours, cost)
        )
    return tuple(planned)
