"""Memory estimates, against real tensors and sums computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from das_ds.models.size import MemoryUse, ModelSize, Sharding
from das_ds.preflight.memory_estimate import (
    ExportSize,
    MemoryEstimate,
    activation_bytes,
    checkpoint_bytes,
    domain_bytes,
    estimate_memory,
    logits_bytes,
)

SIZE = ModelSize(
    trained=1000,
    total=1000,
    largest_layer=300,
    num_units=50,
    num_layers=2,
    hidden=10,
    inner=40,
    heads=2,
    vocabulary=60,
)
NOTHING = MemoryUse()
EXPORT = ExportSize(total=4000, file=1500)
SHARDING = Sharding(stage=2, num_ranks=4, weight_bytes=2, gradient_bytes=4, num_moments=2, bucket=100)


def test_checkpoint_bytes_adamw_equals_its_state() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 7)).sum().backward()
    optimizer.step()
    moments = [s[name] for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    num_bytes = sum(tensor.nbytes for tensor in (*model.parameters(), *moments))
    trained = sum(parameter.numel() for parameter in model.parameters())
    assert checkpoint_bytes(trained, "adamw") == num_bytes == 12 * trained
    assert checkpoint_bytes(trained, "cpu_adam") == num_bytes
    assert checkpoint_bytes(trained, "lion") == 8 * trained


def test_domain_bytes_are_weights_and_model() -> None:
    assert domain_bytes(SIZE) == 8000
    assert domain_bytes(SIZE, num_kept_moments=2) == 16000
    # LoRA: weights and adapter of 100, exported model of 1000.
    assert domain_bytes(replace(SIZE, trained=100, has_adapters=True)) == 400 + 4000 + 400
    # Frozen layers: weights of 100, exported model of 1000.
    assert domain_bytes(replace(SIZE, trained=100)) == 400 + 4000


@pytest.mark.parametrize(
    ("stage", "weight_bytes", "expected"),
    [
        # weights, gathered, gradients, buckets, fp32 weights, moments, gradients of the shard
        (0, 4, (4000, 0, 4000, 4000, 0, 8000, 0)),
        (0, 2, (2000, 0, 6000, 2000, 4000, 8000, 0)),
        (1, 2, (2000, 0, 2000, 400, 1000, 2000, 1000)),
        (2, 2, (2000, 0, 0, 400, 1000, 2000, 2000)),
        (3, 2, (500, 600, 0, 400, 1000, 2000, 2000)),
    ],
)
def test_estimate_memory_by_stage(stage: int, weight_bytes: int, expected: tuple[int, ...]) -> None:
    needed = estimate_memory(
        SIZE,
        replace(SHARDING, stage=stage, weight_bytes=weight_bytes),
        method=NOTHING,
        export=EXPORT,
        copied_bytes=12_000,
    )
    names = ("weights", "gathered weights", "gradients", "buckets", "fp32 weights", "moments", "gradients of the shard")
    assert tuple(needed.device[name] for name in names) == expected
    assert needed.device_bytes == max(sum(expected), needed.device_start)
    assert needed.host == {"copy of a checkpoint": 3000 if stage else 12_000}


def test_estimate_memory_offload_moves_items_to_the_host() -> None:
    stage_3 = replace(SHARDING, stage=3)
    method = MemoryUse(device={"buffer": 5}, optimizer={"importance": 6}, host={"copy": 7})
    here = estimate_memory(SIZE, stage_3, method=method, export=EXPORT, copied_bytes=0)
    there = estimate_memory(
        SIZE,
        replace(stage_3, offloads_optimizer=True, offloads_weights=True),
        method=method,
        export=EXPORT,
        copied_bytes=0,
    )
    assert there.device.keys() == {"gathered weights", "gradients", "buckets", "buffer"}
    assert here.device["importance"] == 6 and here.host["copy"] == 7
    assert {**there.device, **there.host} == {**here.device, **here.host}
    assert here.on_cpu().device_bytes == there.on_cpu().device_bytes


def test_estimate_memory_zero3_gathers_largest_layer_or_live() -> None:
    def gathered(live: int) -> int:
        sharding = replace(SHARDING, stage=3, live=live)
        return estimate_memory(SIZE, sharding, method=NOTHING, export=EXPORT, copied_bytes=0).device["gathered weights"]

    assert (gathered(0), gathered(500), gathered(10**9)) == (600, 1000, 2000)


def test_estimate_memory_construction_may_be_the_peak() -> None:
    needed = estimate_memory(SIZE, replace(SHARDING, num_ranks=1000), method=NOTHING, export=EXPORT, copied_bytes=0)
    assert needed.device_bytes == 4000 > sum(needed.device.values())
    # float32 as it is read, and the copy of what 16 bits would round.
    assert needed.host_bytes == 8000
    assert MemoryEstimate({}, {}, 5, 7, 9).on_cpu() == MemoryEstimate({}, {}, 7, 0, 9)


def test_logits_bytes_are_bounded_by_the_chunk() -> None:
    assert logits_bytes(SIZE, num_positions=8, largest_chunk=10**6) == 3 * 4 * 60 * 8
    assert logits_bytes(SIZE, num_positions=8, largest_chunk=100) == 300


def test_activation_bytes_recomputed_layers_keep_inputs() -> None:
    def needed(num_layers: int) -> int:
        size = replace(SIZE, num_layers=num_layers)
        return activation_bytes(size, num_rows=3, num_tokens=5, weight_bytes=2, is_eager=False, is_recomputed=True)

    assert needed(8) - needed(7) == 3 * 5 * 2 * SIZE.hidden


def test_estimate_memory_rounded_frozen_weights_are_kept() -> None:
    def frozen_bytes(**changes: int) -> int:
        found = estimate_memory(
            replace(SIZE, trained=100), replace(SHARDING, **changes), method=NOTHING, export=EXPORT, copied_bytes=0
        )
        return found.host.get("frozen weights", 0)

    assert frozen_bytes(stage=3) == 4 * 900 // 4
    assert frozen_bytes(stage=3, weight_bytes=4) == frozen_bytes(stage=2) == 0


def test_estimate_memory_rounded_frozen_weights_are_on_rank_0_below_zero3() -> None:
    size = replace(SIZE, trained=100)

    def of_main(**changes: int) -> int:
        sharding = replace(SHARDING, **changes)
        return estimate_memory(size, sharding, method=NOTHING, export=EXPORT, copied_bytes=0).host_main

    assert of_main() == 4 * 900
    assert of_main(weight_bytes=4) == of_main(stage=3) == 0


def test_estimate_memory_export_is_a_file_and_a_weight_on_ranks_that_write() -> None:
    size = replace(SIZE, largest_trained=70)

    def found(num_ranks: int, export: ExportSize, size: ModelSize = size) -> tuple[int, tuple[int, ...]]:
        sharding = replace(SHARDING, num_ranks=num_ranks)
        needed = estimate_memory(size, sharding, method=NOTHING, export=export, copied_bytes=0)
        return needed.host_export, tuple(needed.writers)

    weight = 4 * max(size.largest_layer, 70)
    # Three files: all ranks where there are fewer, else spread over them.
    assert found(2, EXPORT) == (1500 + weight, (0, 1))
    assert found(6, EXPORT) == (1500 + weight, (0, 2, 4))
    # One file, by rank 0; adapters are gathered after it.
    assert found(6, ExportSize(4000, 5000)) == (4000 + weight, (0,))
    adapters = replace(size, trained=10_000, has_adapters=True)
    assert found(6, EXPORT, adapters) == (40_000, (0, 2, 4))
