"""Sizes for estimates: counts of a network, how ZeRO shards it, and the bytes and operations that a method adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

FP32 = 4
"""Bytes of a float32."""

Measurement = Literal["none", "forward", "backward", "gradients"]
"""What a method runs over its sample at the end of a domain: nothing, forward passes, passes whose gradients are those
of few tensors, or passes with the gradients of all weights."""
MEASUREMENTS: tuple[Measurement, ...] = ("none", "forward", "backward", "gradients")
"""From the least memory to the most."""
PlannedMatrices = Literal["none", "inputs", "hidden"]
"""Matrices that the estimates of a method count: none, all that multiply an input, or those of attention and MLPs."""
CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]


@dataclass(frozen=True)
class MatrixSize:
    """One trained matrix W (o, d) that multiplies an input; see `softmask.masked_matrix.MaskedMatrix`."""

    parameter: int
    """Which of `ModelSize.parameters` it lies in."""
    start: int
    """First element of the matrix in the flattened parameter."""
    num_outputs: int
    """o."""
    width: int
    """d."""
    input: str
    """Name of the input; matrices with the same one share what is measured of it."""
    transposed: bool = False
    """Whether it is stored as (d, o)."""

    @property
    def numel(self) -> int:
        """Number of its elements."""
        return self.num_outputs * self.width


@dataclass(frozen=True)
class ModelSize:
    """Counts of a network."""

    trained: int
    """P: all parameters but frozen ones, or those of LoRA."""
    total: int
    """A: all parameters, LoRA's included."""
    largest_layer: int
    """Parameters of the largest module that ZeRO-3 gathers at once."""
    num_units: int
    """Units of all layers and groups."""
    num_layers: int
    hidden: int
    inner: int
    """Neurons of an MLP that one token uses."""
    heads: int
    vocabulary: int
    has_adapters: bool = False
    """Whether LoRA is trained instead of the weights."""
    largest_trained: int = 0
    """Elements of the largest trained parameter, whose gradient is complete before it is reduced."""
    parameters: tuple[tuple[int, int], ...] = ()
    """(elements, group of the optimizer) of every trained parameter in the order of the engine; like `matrices` only
    where the method asks for it."""
    matrices: tuple[MatrixSize, ...] = ()
    """The method's `planned_matrices`, in the order in which masks have them."""

    @property
    def has_frozen(self) -> bool:
        """Whether some weights are not trained."""
        return self.trained < self.total


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
    num_buckets: int = 2
    """Buffers of that size."""
    live: int = 0
    """Gathered weights that ZeRO-3 may keep."""

    @property
    def optimizer_shards(self) -> int:
        """Shards of the optimizer's state."""
        return self.num_ranks if self.stage >= 1 else 1

    @property
    def weight_shards(self) -> int:
        """Shards of the weights of training."""
        return self.num_ranks if self.stage == 3 else 1


@dataclass(frozen=True)
class MemoryUse:
    """Bytes that a method adds to model and optimizer."""

    device: Mapping[str, int] = field(default_factory=dict)
    """Name -> bytes of one rank, on the device."""
    optimizer: Mapping[str, int] = field(default_factory=dict)
    """Name -> bytes of one rank, where the optimizer's state is: in host memory where that is offloaded."""
    host: Mapping[str, int] = field(default_factory=dict)
    """Name -> bytes of one rank, in host memory."""
    checkpoint: int = 0
    """Of a checkpoint within a domain, over all ranks."""
    checkpoint_of_rank: int = 0
    """Of such a checkpoint in addition, from each rank: what is different on every one of them."""
    checkpoint_in_place: int = 0
    """Of these, what is written from where it is, without a copy in host memory."""
    domain: int = 0
    """On disk for every domain, over all ranks: in the checkpoint at its end, and in separate files."""
    run: int = 0
    """On disk once: files of the complete run."""
    extra_rows: int = 0
    """Rows that one forward pass of a rank has in addition to those of its micro-batch."""
    device_in_step: Mapping[str, int] = field(default_factory=dict)
    """Name -> bytes of one rank on the device that exist only during a step."""
    device_at_start: Mapping[str, int] = field(default_factory=dict)
    """Name -> bytes of one rank on the device that exist only while a domain starts, between two steps."""
    device_at_end: Mapping[str, int] = field(default_factory=dict)
    """Name -> bytes of one rank on the device that exist only while a domain is measured at its end."""
    host_at_end: Mapping[str, int] = field(default_factory=dict)
    """Name -> bytes of one rank in host memory that exist only then."""
    measurement: Measurement = "none"
    """What runs at the end of a domain, which decides on the gradients and activations that exist then."""

    def __add__(self, other: MemoryUse) -> MemoryUse:
        return MemoryUse(
            device={**self.device, **other.device},
            optimizer={**self.optimizer, **other.optimizer},
            host={**self.host, **other.host},
            checkpoint=self.checkpoint + other.checkpoint,
            checkpoint_of_rank=self.checkpoint_of_rank + other.checkpoint_of_rank,
            checkpoint_in_place=self.checkpoint_in_place + other.checkpoint_in_place,
            domain=self.domain + other.domain,
            run=self.run + other.run,
            extra_rows=self.extra_rows + other.extra_rows,
            device_in_step={**self.device_in_step, **other.device_in_step},
            device_at_start={**self.device_at_start, **other.device_at_start},
            device_at_end={**self.device_at_end, **other.device_at_end},
            host_at_end={**self.host_at_end, **other.host_at_end},
            measurement=max(self.measurement, other.measurement, key=MEASUREMENTS.index),
        )


@dataclass(frozen=True)
class MeasuredSequences:
    """Sequences that a method passes through the network outside of steps: over all ranks, each as often as it is
    passed, at most. What a pass is says `MemoryUse.measurement`."""

    before_first: int = 0
    """Before the first domain."""
    before_later: int = 0
    """Before each further domain."""
    after: int = 0
    """After each domain."""


@dataclass(frozen=True)
class Collective:
    """One kind of exchange between all ranks, summed over an optimizer step."""

    kind: CollectiveKind
    content: str
    """What is exchanged, in words."""
    num_bytes: int
    """Of the complete tensors: what is reduced, or gathered from all ranks; what a rank sends, for `all_to_all`."""


@dataclass(frozen=True)
class StepUse:
    """What a method adds to each optimizer step, besides the rows of `MemoryUse.extra_rows`."""

    flops: int = 0
    """Floating-point operations of all ranks together, as few large matrix products."""
    forward_passes: int = 0
    """Further forward passes of each micro-step, for which ZeRO-3 gathers the weights."""
    forward_rows: float = 0.0
    """Rows that they read, relative to those of the global batch."""
    collectives: tuple[Collective, ...] = ()
    """What ranks exchange, without what DeepSpeed gathers for the passes."""
    num_losses: int = 0
    """Losses in addition to that of pre-training; ranks exchange each for the log."""

    def __add__(self, other: StepUse) -> StepUse:
        return StepUse(
            flops=self.flops + other.flops,
            forward_passes=self.forward_passes + other.forward_passes,
            forward_rows=self.forward_rows + other.forward_rows,
            collectives=(*self.collectives, *other.collectives),
            num_losses=self.num_losses + other.num_losses,
        )
