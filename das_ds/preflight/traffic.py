"""What ranks exchange in one optimizer step, in bytes, computed from sizes only.

Legend: W ranks, A micro-steps, P trained parameters, w bytes of a weight in training, c bytes of a gradient on its way.
The formulas are those of DeepSpeed 0.19.8; `tests/full/test_fake_process_group.py` counts its collectives.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from das_ds.config.deepspeed import EngineConfig
from das_ds.functional.units import UnitLayout
from das_ds.models.size import FP32, Collective, Sharding, StepUse

FP64 = 8
"""Bytes of the squared gradient norm."""
COMMUNICATION_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
PERSISTENCE_THRESHOLD = 10**5
"""DeepSpeed's default of `stage3_param_persistence_threshold`."""
REUSE_DISTANCE = 10**9
"""DeepSpeed's default of `stage3_max_reuse_distance`."""
LAYER = re.compile(r".*?\.\d+\.")


@dataclass(frozen=True)
class WeightSizes:
    """Numbers of elements of every parameter."""

    matrices: tuple[int, ...]
    """Trained, with weight decay."""
    vectors: tuple[int, ...]
    """Trained, without."""
    frozen: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()
    """Of whole layers."""

    @property
    def trained(self) -> tuple[int, ...]:
        """All trained parameters."""
        return (*self.matrices, *self.vectors)

    @classmethod
    def of_layout(
        cls,
        layout: UnitLayout,
        adapters: tuple[int, ...] = (),
        added_tokens: int = 0,
        frozen: Collection[str] = (),
    ) -> WeightSizes:
        """Sizes of a network.

        Args:
            layout: of the network without adapters.
            adapters: sizes of LoRA's matrices; then nothing else is trained.
            added_tokens: rows that every parameter with a row per token gains.
            frozen: parameters that are not trained.
        """
        sizes = {
            name: size + (added_tokens * layout.shapes[name][2] if name in layout.vocabulary else 0)
            for name, size in layout.sizes.items()
        }
        layers: Counter[str] = Counter()
        for name, size in sizes.items():
            if layer := LAYER.match(name):
                layers[layer[0]] += size
        by_layer = tuple(layers.values())
        if adapters:
            return cls(adapters, (), tuple(sizes.values()), by_layer)
        matrices = {name for name, (_, _, columns) in layout.shapes.items() if columns > 1}
        return cls(
            tuple(size for name, size in sizes.items() if name in matrices and name not in frozen),
            tuple(size for name, size in sizes.items() if name not in matrices and name not in frozen),
            tuple(sizes[name] for name in sizes if name in frozen),
            by_layer,
        )


def step_collectives(
    weights: WeightSizes,
    sharding: Sharding,
    engine: EngineConfig,
    method: StepUse,
    *,
    is_recomputed: bool,
) -> list[Collective]:
    """Everything that ranks exchange in one optimizer step; nothing on one rank.

    | stage | gradients                     | weights                                                   |
    |-------|-------------------------------|-----------------------------------------------------------|
    | 0     | all-reduce c P                |                                                           |
    | 1     | all-reduce c P                | all-gather w P, each group padded to a multiple of 2 W    |
    | 2     | all-reduce A c P              | the same                                                  |
    | 3     | reduce-scatter A c P, padded  | all-gather, see `_stage3_gathers`                         |

    At stage 3 every parameter is padded to a multiple of W. In addition: the squared norm in float64 at stages 1 to 3,
    the number of predicted tokens and each loss in float32, and what the method exchanges. With
    `zero_hpz_partition_size` part of the gathering stays within nodes, which is not considered, nor is the padding of
    the additional groups that `train.layer_lr_decay` makes, 2 W elements each at most.

    Args:
        weights: sizes of the parameters.
        sharding: stage and ranks.
        engine: DeepSpeed's settings.
        method: what the method adds.
        is_recomputed: whether the backward pass recomputes activations, layer by layer.
    """
    num_ranks = sharding.num_ranks
    if num_ranks == 1:
        return []
    micro_steps = int(engine.raw["gradient_accumulation_steps"])
    name = engine.raw.get("communication_data_type")
    gradient_bytes = sharding.weight_bytes if name is None else COMMUNICATION_BYTES[name]
    found = [_gradients(weights, sharding, gradient_bytes, micro_steps)]
    if sharding.stage in (1, 2):
        groups = (sum(weights.matrices), sum(weights.vectors))
        padded = sum(_rounded_up(group, 2 * num_ranks) for group in groups)
        found.append(Collective("all_gather", "weights", sharding.weight_bytes * padded))
    if sharding.stage == 3:
        zero = engine.raw["zero_optimization"]
        passes = micro_steps * method.forward_passes
        found.append(_stage3_gathers(weights, sharding, zero, micro_steps, passes, is_recomputed=is_recomputed))
    if sharding.stage > 0:
        found.append(Collective("all_reduce", "gradient norm", FP64))
    found.append(Collective("all_reduce", "losses and number of tokens", FP32 * (2 + method.num_losses)))
    return [*found, *method.collectives]


def forward_collectives(weights: WeightSizes, sharding: Sharding, engine: EngineConfig) -> list[Collective]:
    """What ranks exchange in a forward pass alone: the weights that stage 3 gathers, each once."""
    if sharding.num_ranks == 1 or sharding.stage != 3:
        return []
    return [_stage3_gathers(weights, sharding, engine.raw["zero_optimization"], 0, 1, is_recomputed=False)]


def bytes_sent(collective: Collective, num_ranks: int) -> float:
    """Bytes that one rank sends, in a ring: 2 (W - 1) / W of what is reduced for all, (W - 1) / W of what is gathered
    or scattered; all of what it sends to single ranks."""
    if collective.kind == "all_to_all":
        return collective.num_bytes
    times = 2 if collective.kind == "all_reduce" else 1
    return times * (num_ranks - 1) / num_ranks * collective.num_bytes


def _gradients(weights: WeightSizes, sharding: Sharding, gradient_bytes: int, micro_steps: int) -> Collective:
    if sharding.stage == 3:
        padded = sum(_rounded_up(size, sharding.num_ranks) for size in weights.trained)
        return Collective("reduce_scatter", "gradients", micro_steps * gradient_bytes * padded)
    # Stages 0 and 1 add up the gradients of micro-steps before they are reduced.
    times = micro_steps if sharding.stage == 2 else 1
    return Collective("all_reduce", "gradients", times * gradient_bytes * sum(weights.trained))


def _stage3_gathers(
    weights: WeightSizes,
    sharding: Sharding,
    zero: Mapping[str, Any],
    micro_steps: int,
    forward_passes: int,
    *,
    is_recomputed: bool,
) -> Collective:
    """Gathered weights of one step at stage 3.

        w (S + A (2 B - min(B, d / 2) + n max(0, l - d / 2)) + f B)

    B are large parameters, S small ones up to the persistence threshold, which are gathered once a step. B are gathered
    for the forward and for the backward pass, but for those whose weights the passes reuse within d elements
    (`stage3_max_reuse_distance`), which stay: the last d / 2 of the forward pass. Where n layers of l elements are
    recomputed, what is not reused within the layer is gathered a third time. f are forward passes alone. It is that of
    a step which DeepSpeed's record of earlier steps fits, without what its prefetching makes stay gathered.
    """
    num_ranks = sharding.num_ranks
    threshold = int(zero.get("stage3_param_persistence_threshold", PERSISTENCE_THRESHOLD))
    reuse = int(zero.get("stage3_max_reuse_distance", REUSE_DISTANCE)) // 2
    sizes = (*weights.trained, *weights.frozen)
    small = sum(_rounded_up(size, num_ranks) for size in sizes if size <= threshold)
    large = sum(_rounded_up(size, num_ranks) for size in sizes if size > threshold)
    per_micro_step = 2 * large - min(large, reuse)
    if is_recomputed:
        per_micro_step += sum(max(0, layer - reuse) for layer in weights.layers)
    total = small + micro_steps * per_micro_step + forward_passes * large
    return Collective("all_gather", "weights", sharding.weight_bytes * total)


def _rounded_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
