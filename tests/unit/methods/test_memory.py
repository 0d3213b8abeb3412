"""Memory and disk space of methods, by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from das_ds.config import RunConfig
from das_ds.config.deepspeed import build_engine_config
from das_ds.methods import method_memory, method_step_use
from das_ds.models.size import MatrixSize, MemoryUse, ModelSize, Sharding, StepUse
from das_ds.preflight.memory import activation_estimate, disk_use, estimate_run_memory, unsharded_use
from helpers.configs import make_config

SIZE = ModelSize(
    trained=1000,
    total=1200,
    largest_layer=500,
    num_units=50,
    num_layers=2,
    hidden=24,
    inner=40,
    heads=3,
    vocabulary=100,
)
SHARDING = Sharding(stage=2, num_ranks=4, weight_bytes=2, gradient_bytes=4, num_moments=2)
DERPP: dict[str, Any] = {"name": "derpp", "capacity": 11, "max_positions": 8, "batch_size": 9}
# 16 tokens and 8 answers: 4 x 16 + 8 x (8 + 2 x 24).
ROW = 512
# Two layers of three inputs of 24 numbers and one of 40, and two of the LM head.
MATRICES = [
    (num_outputs, width, f"{layer}.{name}")
    for layer in range(2)
    for num_outputs, width, name in [(24, 24, "q"), (24, 24, "q"), (24, 24, "o"), (40, 24, "up"), (24, 40, "down")]
] + [(24, 24, "head"), (100, 24, "vocabulary")]
WITH_MATRICES = replace(
    SIZE,
    parameters=tuple((o * d, True) for o, d, _ in MATRICES),
    matrices=tuple(MatrixSize(number, 0, o, d, name) for number, (o, d, name) in enumerate(MATRICES)),
)
TRAINED = sum(o * d for o, d, _ in MATRICES)
MOMENTS = 4 * (2 * (3 * 24**2 + 40**2) + 2 * 24**2)
LARGEST = 4 * 40**2


def config(method: str | dict[str, Any], *overrides: str) -> RunConfig:
    """A run of a method on batches of 32 in micro-batches of 4; at ZeRO 2 and in bf16 by default."""
    return make_config(
        "run",
        "data.sequence_length=16",
        "train.global_batch_size=32",
        "train.precision=bf16",
        "deepspeed.zero_optimization.stage=2",
        f"method={json.dumps(method)}",
        *overrides,
    )


def importance(**softmask: Any) -> dict[str, Any]:
    return {"name": "das", "importance": {"granularity": "parameter"}, "softmask": softmask}


@pytest.mark.parametrize(
    ("method", "stage", "precision", "part", "expected"),
    [
        ("ewc", 2, "bf16", "Fisher information", 2000),
        ("ewc", 0, "bf16", "Fisher information", 8000),
        ("l2", 2, "bf16", "anchor", 1000),
        ("l2", 0, "fp32", "anchor", 4000),
        ("kd", 2, "bf16", "teacher", 2000),
        ("kd", 0, "fp32", "teacher", 4000),
        ("stm", 3, "bf16", "teacher", 500),
        ("kd", 3, "fp16", "teacher", 500),
        # Eleven rows on four ranks are three on the first.
        (DERPP, 3, "bf16", "buffer", 3 * ROW),
        ("das", 2, "bf16", "importance", 3 * 4 * 50),
        # Accumulated and new, one byte each, and float32 sums.
        (importance(), 2, "bf16", "importance", 6 * 1000 // 4),
        (importance(), 0, "bf16", "importance", 6 * 1000),
    ],
)
def test_memory_by_stage(method: str | dict[str, Any], stage: int, precision: str, part: str, expected: int) -> None:
    overrides = (f"deepspeed.zero_optimization.stage={stage}", f"train.precision={precision}")
    run = config(method, *overrides)
    found, plain = (
        estimate_run_memory(c, SIZE, build_engine_config(c, 4), 4) for c in (run, config("ncl", *overrides))
    )
    assert found.device == {**plain.device, part: expected}
    copied = unsharded_use(run, SIZE).checkpoint // (1 if stage == 0 else 4)
    assert found.host["copy of a checkpoint"] - plain.host["copy of a checkpoint"] == copied


@pytest.mark.parametrize(
    ("method", "has_own_mask"),
    [
        (importance(), False),
        (importance(exponent=2.0), True),
        (importance(unowned_update_scale=0.5), True),
        (importance(groups=["head"]), True),
        ({**importance(), "name": "dga"}, True),
    ],
)
def test_memory_own_mask_is_counted(method: dict[str, Any], has_own_mask: bool) -> None:
    use = method_memory(config(method), SIZE, SHARDING)
    assert use.optimizer["importance"] == (7 if has_own_mask else 6) * 1000 // 4
    by_unit = {**method, "importance": {"granularity": "unit"}}
    assert method_memory(config(by_unit), SIZE, SHARDING).optimizer["importance"] == 3 * 4 * 50


REPLAY_KL: dict[str, Any] = {"name": "ncl", "replay": {"fraction": 0.125, "loss": "kl"}}
SECOND_DOMAIN = "domains=[{name: first, train: [unused.txt]}, {name: second, train: [unused.txt]}]"


@pytest.mark.parametrize(
    ("stage", "device"),
    [
        (2, {"teacher": 2000}),
        # In addition the gathered LM head, 100 tokens of 24 numbers.
        (3, {"teacher": 500, "LM head of the teacher": 2 * 100 * 24}),
    ],
)
def test_memory_replay_kl_counts_teacher(stage: int, device: dict[str, int]) -> None:
    sharding = replace(SHARDING, stage=stage)
    run = config(REPLAY_KL, SECOND_DOMAIN)
    assert method_memory(run, SIZE, sharding) == MemoryUse(device=device, checkpoint=2000)
    # 4 of 32 sequences; at stage 3 one of each of the 32 / 4 micro-batches.
    step = method_step_use(run, SIZE, sharding)
    assert (step.forward_passes, step.forward_rows, step.num_losses) == (1, 0.25 if stage == 3 else 0.125, 1)
    merged = config({**REPLAY_KL, "name": "ewc", "merge": {"weight": 0.5}}, SECOND_DOMAIN)
    plain = config({"name": "ewc", "merge": {"weight": 0.5}}, SECOND_DOMAIN)
    found, without = (method_memory(c, SIZE, sharding) for c in (merged, plain))
    assert found.checkpoint == without.checkpoint + 2000 and set(found.device) == {*without.device, *device}


def test_memory_replay_kl_of_nothing_is_free() -> None:
    """A single domain, and cross-entropy on two."""
    cross_entropy = {"name": "ncl", "replay": {"fraction": 0.125}}
    for run in (config(REPLAY_KL), config(cross_entropy, SECOND_DOMAIN)):
        assert method_memory(run, SIZE, SHARDING) == MemoryUse()
        assert method_step_use(run, SIZE, SHARDING) == StepUse()


def widest_sets(stage: int) -> tuple[int, int]:
    """(bytes of dense projectors, of moments) of the rank that has most, of four."""
    held: list[set[str]] = [set() for _ in range(4)]
    counts: list[dict[str, int]] = [{} for _ in range(4)]
    position = 0
    for o, d, name in MATRICES:
        for element in range(o * d):
            # In equal parts: of all matrices in a row, or of each.
            rank = (position + element) * 4 // TRAINED if stage in (1, 2) else element * 4 // (o * d)
            held[rank].add(name)
            counts[rank][name] = counts[rank].get(name, 0) + 1
        position += o * d
    size = {name: 4 * d**2 for _, d, name in MATRICES}
    owned = [0] * 4
    for name in size:
        most = max(found.get(name, 0) for found in counts)
        owner = min((r for r in range(4) if counts[r].get(name, 0) == most), key=lambda r: owned[r])
        owned[owner] += size[name]
    return max(sum(size[name] for name in names) for names in held), max(owned)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_memory_directions_keep_own_moments_and_masks(stage: int) -> None:
    run = config("directions", f"deepspeed.zero_optimization.stage={stage}")
    found = estimate_run_memory(run, WITH_MATRICES, build_engine_config(run, 4), 4)
    held, owned = widest_sets(stage)
    assert found.device["direction masks"] == (held if stage in (1, 2) else MOMENTS)
    assert found.host["moments of inputs"] == owned
    # Moments are written from where they are; only the sums of a pass are copied, on every rank.
    plain = config("ncl", f"deepspeed.zero_optimization.stage={stage}")
    without = estimate_run_memory(plain, WITH_MATRICES, build_engine_config(plain, 4), 4)
    assert found.host["copy of a checkpoint"] - without.host["copy of a checkpoint"] == MOMENTS


def test_memory_directions_form_of_projectors() -> None:
    def held(method: dict[str, Any], precision: str = "bf16") -> int:
        sharding = replace(SHARDING, stage=3, weight_bytes=4 if precision == "fp32" else 2)
        run = config({"name": "directions", **method}, f"train.precision={precision}")
        return method_memory(run, WITH_MATRICES, sharding).device["direction masks"]

    # Eight inputs of 24 numbers and two of 40; above half the width, projectors are exact.
    assert held({"rank": 5}, "fp32") == 4 * 5 * (8 * 24 + 2 * 40 + 10)
    assert held({"rank": 5}) == 2 * 5 * (8 * 24 + 2 * 40) + 4 * 5 * 10
    assert held({"rank": 13}) == 8 * 4 * 24**2 + 2 * (2 * 13 * 40 + 4 * 13)
    assert held({"rank": "auto"}) == held({"rank": "full"}) == MOMENTS


def test_memory_directions_stay_on_the_device_under_offload() -> None:
    run = config("directions", "deepspeed.zero_optimization.offload_optimizer.device=cpu")
    found = estimate_run_memory(run, WITH_MATRICES, build_engine_config(run, 4), 4)
    assert "direction masks" in found.device and "moments" not in found.device


def test_memory_directions_peaks_between_domains() -> None:
    use = method_memory(config("directions"), WITH_MATRICES, SHARDING)
    # All sums fit at once, and a product of 16-bit inputs comes on top.
    assert use.device_at_end == {"sums of inputs": MOMENTS + LARGEST} and use.measurement == "forward"
    owned = widest_sets(2)[1]
    assert use.host_at_end == {"moments of one domain": owned, "sums over domains": owned}
    # A float64 and a float32 matrix and three columns, of which the projector remains.
    work = 12 * 40**2 + 8 * 3 * 40
    assert use.device_at_start == {"projector of one input": work - 4 * 40**2}
    low_rank = method_memory(config({"name": "directions", "rank": 3}), WITH_MATRICES, SHARDING)
    assert low_rank.device_at_start == {"projector of one input": work - 2 * 3 * 40 - 4 * 3}
    # Large networks are measured in groups, of 2 GiB or of one input; a product takes 64 MiB on top.
    for width, sums in ((1 << 13, 2 << 30), (1 << 16, 4 << 32)):
        matrices = tuple(MatrixSize(number, 0, 1, width, f"{number}") for number in range(64))
        large = replace(SIZE, parameters=((width, True),) * 64, matrices=matrices)
        for weight_bytes, product in ((4, 0), (2, 64 << 20)):
            found = method_memory(config("directions"), large, replace(SHARDING, weight_bytes=weight_bytes))
            assert found.device_at_end == {"sums of inputs": sums + product}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_memory_regmean_by_hand(stage: int) -> None:
    use = method_memory(config("regmean"), WITH_MATRICES, replace(SHARDING, stage=stage))
    assert use.host == {
        "moments of inputs": widest_sets(stage)[1],
        "weights before the domain": 4000 if stage == 0 else 1000,
    }
    assert use.measurement == "forward" and use.device == use.optimizer == use.device_in_step == {}
    # Of the input of 40 numbers: five float64 matrices, the distances of its matrix of 24 outputs, and two products.
    elements = {0: 24 * 40, 2: 24 * 40, 3: 24 * 40 // 4}[stage]
    assert sum(use.device_at_end.values()) == 5 * 8 * 40**2 + (4 + 2 * 8) * elements


@pytest.mark.parametrize(
    ("method", "passes"),
    [("gradient", 2), ("update", 1), ("both", 2)],
)
@pytest.mark.parametrize(("rank", "operations"), [("full", 2), (5, 4)])
def test_step_of_directions_by_hand(method: str, passes: int, rank: str | int, operations: int) -> None:
    """A pass of gradients, one of updates, and one of decay where only gradients are masked."""
    run = config({"name": "directions", "apply_to": method, "rank": rank})
    found = method_step_use(run, WITH_MATRICES, replace(SHARDING, num_ranks=1))
    assert found.flops == passes * sum(operations * o * d * (d if rank == "full" else 5) for o, d, _ in MATRICES)
    assert found.collectives == ()
    without_decay = config({"name": "directions", "apply_to": method, "rank": rank}, "train.weight_decay=0.0")
    fewer = passes - (method == "gradient")
    assert method_step_use(without_decay, WITH_MATRICES, SHARDING).flops == found.flops // passes * fewer
    # Without ZeRO every rank does everything.
    everywhere = replace(SHARDING, stage=0)
    assert method_step_use(run, WITH_MATRICES, everywhere).flops == 4 * found.flops


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_memory_osft_by_hand(stage: int) -> None:
    """Of 24 directions 18 are frozen: a side of 24 is stored with 6 others, one of 40 with the 18."""
    matrices = [(24, 24), (24, 24), (24, 24), (24, 24), (40, 24), (24, 40)]
    size = replace(
        SIZE,
        parameters=tuple((o * d, True) for o, d in matrices),
        matrices=tuple(MatrixSize(number, 0, o, d, f"{number}") for number, (o, d) in enumerate(matrices)),
        trained=sum(o * d for o, d in matrices),
    )
    square = 4 * 2 * (24 + 1) * 6
    rectangle = 4 * ((24 + 1) * 6 + (40 + 1) * 18)
    sharding = replace(SHARDING, stage=stage, num_ranks=2)
    use = method_memory(config("osft"), size, sharding)
    complete = 4 * square + 2 * rectangle
    assert use.checkpoint == complete and use.domain == use.run == 0
    # At stage 2 the first rank's half ends 384 elements into the fourth matrix; at stage 3 ranks take turns.
    halves = {0: complete, 2: max(4 * square, 2 * rectangle), 3: 2 * square + rectangle}
    assert use.device["frozen subspaces"] == halves[stage]
    step = method_step_use(config("osft"), size, sharding)
    products = 4 * 4 * 24 * 24 * (6 + 6) + 2 * 4 * 40 * 24 * (6 + 18)
    assert step.flops == 2 * products * (2 if stage == 0 else 1)
    # Gradients in float32 as they are accumulated, and updates: there and back.
    sent = {0: 0, 2: 24 * 24 - 384, 3: size.trained // 2}
    assert sum(collective.num_bytes for collective in step.collectives) == 2 * 4 * sent[stage]


def test_memory_merge_and_offload_are_in_host_memory() -> None:
    run = config("merge")
    found = estimate_run_memory(run, SIZE, build_engine_config(run, 4), 4)
    assert found.host["weights before the domain"] == 1000
    offloaded = config("ewc", "deepspeed.zero_optimization.offload_optimizer.device=cpu")
    found = estimate_run_memory(offloaded, SIZE, build_engine_config(offloaded, 4), 4)
    assert found.host["Fisher information"] == 2000 and "Fisher information" not in found.device


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        # Of a checkpoint within a domain, of every domain, of the run.
        ("ewc", (8000, 4000, 0)),
        ("kd", (2000, 0, 0)),
        ("l2", (4000, 0, 0)),
        ("freeze", (0, 0, 0)),
        (DERPP, (11 * ROW, 11 * ROW, 0)),
        ("directions", (2 * MOMENTS, 2 * MOMENTS, MOMENTS)),
        ("merge", (4000, 0, 0)),
        # Two sums of moments, and the weights before the domain.
        ("regmean", (2 * MOMENTS + 4000, MOMENTS, 0)),
        ({"name": "ewc", "merge": {"weight": 0.5}}, (12_000, 4000, 0)),
        ("ncl", (0, 0, 0)),
        # Importance of 50 units, and the sums of a pass over them.
        ("das", (200 + 200, 200, 400)),
        (importance(), (1000 + 4000, 1000, 2000)),
    ],
)
def test_memory_disk_space_by_method(method: str | dict[str, Any], expected: tuple[int, int, int]) -> None:
    use = unsharded_use(config(method), WITH_MATRICES)
    assert (use.checkpoint, use.domain, use.run) == expected


@pytest.mark.parametrize(
    ("method", "rows"),
    # 9 of 32 sequences are 1.125 of 4: two rows more.
    [("ncl", 4), ("das", 16), ({"name": "das", "contrastive": {"weight": 0.0}}, 4), ("directions", 4), (DERPP, 6)],
)
def test_memory_extra_rows_of_forward_pass(method: str | dict[str, Any], rows: int) -> None:
    run = config(method)
    assert run.train.micro_batch_size + unsharded_use(run, WITH_MATRICES).extra_rows == rows
    assert activation_estimate(run, WITH_MATRICES) >= activation_estimate(config("ncl"), SIZE)


def test_memory_sums_of_every_rank_are_in_a_checkpoint() -> None:
    run = config("directions")
    plain = config("ncl")
    for num_ranks in (1, 64):
        found = disk_use(run, WITH_MATRICES, num_ranks).checkpoint - disk_use(plain, SIZE, num_ranks).checkpoint
        assert found == 2 * MOMENTS + num_ranks * MOMENTS


def test_memory_use_sum_adds_parts() -> None:
    first = MemoryUse({"a": 1}, {"b": 2}, {"c": 3}, checkpoint=4, domain=5, run=6, extra_rows=7)
    second = MemoryUse(
        {"d": 8}, {}, {"e": 9}, checkpoint=10, checkpoint_in_place=3, domain=11, run=12, measurement="forward"
    )
    assert first + second == MemoryUse(
        {"a": 1, "d": 8},
        {"b": 2},
        {"c": 3, "e": 9},
        checkpoint=14,
        checkpoint_in_place=3,
        domain=16,
        run=18,
        extra_rows=7,
        measurement="forward",
    )
