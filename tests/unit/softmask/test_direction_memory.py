"""Estimated memory of directions against counted allocations of a small network, on one rank."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

from das_ds.checkpoint.format import immutable_tensors
from das_ds.context import CorpusSample
from das_ds.distributed.resumable import ResumableLoops
from das_ds.functional.directions import build_projector, projector_work_bytes
from das_ds.methods import build_method, method_memory
from das_ds.models.architectures.registry import spec_for
from das_ds.models.size import MemoryUse, Sharding
from das_ds.preflight.memory import count_parameters
from das_ds.softmask import direction_memory, input_moments
from das_ds.softmask.direction import DirectionImportance
from das_ds.softmask.direction_mask import build_direction_mask
from das_ds.softmask.direction_update_mask import build_update_masks
from das_ds.softmask.input_layout import build_input_layout
from das_ds.softmask.linear_inputs import find_masked_matrices
from helpers.allocations import AllocationCounter
from helpers.fake_run import make_run
from helpers.tiny_models import tiny_model, without_dropout
from helpers.training import no_text_domain, random_batch

# Wide inputs and few tokens, so that moments are larger than activations.
NETWORK = {"hidden_size": 96, "intermediate_size": 160}
SHARDING = Sharding(stage=2, num_ranks=1, weight_bytes=4, gradient_bytes=4, num_moments=2)
METHOD = {"name": "directions", "half_saturation": 2.0}


def make_estimate(run: Any, sharding: Sharding = SHARDING) -> MemoryUse:
    with torch.device("meta"):
        model = tiny_model("roberta", **without_dropout("roberta"), **NETWORK)
    return method_memory(run.config, count_parameters(run.config, model, spec_for("roberta"), 100), sharding)


def make_sample(loops: ResumableLoops) -> CorpusSample:
    batches = [random_batch(1, seed) for seed in range(2)]
    return CorpusSample("inputs", lambda label, **_: loops.start(batches, label), None)


def measure(run: Any, loops: ResumableLoops | None = None) -> DirectionImportance:
    layout = build_input_layout(find_masked_matrices(run), run.engine.weights.shards, run.engine.ranks)
    importance = DirectionImportance(run, layout, {}, None)
    importance.measure(make_sample(loops or ResumableLoops(show_progress=False)))
    return importance


def assert_close(found: int, estimated: int) -> None:
    assert found == pytest.approx(estimated, rel=0.1)


@pytest.mark.parametrize("budget", [1 << 30, 4 * (3 * 96**2 + 160**2), 1])
def test_memory_while_measuring_is_as_estimated(budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (input_moments, direction_memory):
        monkeypatch.setattr(module, "SUMS_BYTES", budget)
    run = make_run(tmp_path, METHOD, **NETWORK)
    estimate = make_estimate(run)
    find_masked_matrices(run)
    counter = AllocationCounter()
    counter.ignore([*run.network.parameters(), *run.network.buffers()])
    # The forward pass alone.
    batch = random_batch(1, 0)
    forward = AllocationCounter()
    forward.ignore([*run.network.parameters(), *run.network.buffers()])
    with forward, torch.no_grad():
        run.network(batch.corrupted_ids, batch.predicted, batch.targets)
    with counter:
        importance = measure(run)
    assert_close(sum(moment.nbytes for moment in importance.moments.values()), estimate.host["moments of inputs"])
    # On a CPU the moments that are complete are in the same memory as the sums of the others.
    complete = estimate.host["moments of inputs"] if budget < estimate.host["moments of inputs"] else 0
    sums = estimate.device_at_end["sums of inputs"]
    assert counter.peak - forward.peak <= 1.1 * (complete + sums)
    assert counter.peak >= 0.9 * max(complete, sums)
    assert_close(counter.num_bytes, estimate.host["moments of inputs"])


@pytest.mark.parametrize("rank", ["full", 24, "auto"])
def test_memory_of_projectors_is_as_estimated(rank: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path, {**METHOD, "rank": rank}, **NETWORK)
    estimate = make_estimate(run)
    importance = measure(run)
    counter = AllocationCounter()
    counter.ignore(importance.moments.values())
    with counter:
        held = dict(importance.projectors(lambda moment: build_projector(moment, 0.5, rank)))
    num_bytes = sum(projector.num_bytes for projector in held.values())
    assert counter.num_bytes == num_bytes
    if rank == "auto":
        assert num_bytes <= estimate.device["direction masks"]
    else:
        assert_close(num_bytes, estimate.device["direction masks"])
    # The last is computed while the others are there.
    estimated = estimate.device["direction masks"] + estimate.device_at_start["projector of one input"]
    assert counter.peak <= 1.01 * estimated
    if rank == "full":
        assert counter.peak >= 0.8 * estimated


@pytest.mark.parametrize("rank", ["full", 24, "auto"])
def test_memory_of_one_projector_with_work_spaces(rank: Any) -> None:
    """By torch's allocator, which counts what operations have for a while, those of LAPACK too."""
    width = 512
    vectors, _ = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0)))
    moment = (vectors / torch.arange(1, width + 1)) @ vectors.T
    moment = moment * width / moment.trace()
    build_projector(moment, 1.0, rank)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        projector = build_projector(moment, 1.0, rank)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    assert max(accumulate(changes)) == pytest.approx(projector_work_bytes(width), rel=0.03)
    assert sum(changes) == pytest.approx(projector.num_bytes, rel=0.01)


@pytest.mark.parametrize("apply_to", ["gradient", "update", "both"])
@pytest.mark.parametrize("rank", ["full", 16])
def test_memory_of_a_step_is_as_estimated(apply_to: Any, rank: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path, {**METHOD, "rank": rank, "apply_to": apply_to}, **NETWORK)
    use = make_estimate(run)
    products = use.device_in_step["products of masks"]
    old_values = use.optimizer.get("old values of a chunk", 0)
    matrices = find_masked_matrices(run)
    shards = run.engine.weights.shards
    projectors = {m.input: build_projector(torch.eye(m.width), 2.0, rank) for m in matrices}
    counter = AllocationCounter()
    gradients = [torch.ones(shard.numel) for shard in shards]
    tensors = [t for p in projectors.values() for t in vars(p).values() if isinstance(t, torch.Tensor)]
    counter.ignore([*gradients, *tensors])
    peaks = []
    if apply_to != "update":
        mask = build_direction_mask(shards, matrices, projectors, torch.device("cpu"))
        with counter:
            mask.apply_(gradients)
        peaks.append(counter.peak)
    if apply_to != "gradient":
        # One flat tensor of all parameters, as at stages 1 and 2.
        flat = torch.cat([torch.ones(shard.numel) for shard in shards])
        starts = [0, *accumulate(shard.numel for shard in shards)]
        placed = [replace(shard, flat=flat, flat_start=start) for shard, start in zip(shards, starts, strict=False)]
        flats = dict.fromkeys((shard.name for shard in shards), flat)
        updates = build_update_masks(placed, flats, matrices, projectors, torch.device("cpu"))[flat]
        counter = AllocationCounter()
        counter.ignore([flat, *tensors])
        with counter:
            for chunk in updates.chunks():
                updates.blend_(flat[chunk], flat[chunk].clone(), chunk)
            updates.finish_(flat)
        peaks.append(counter.peak)
    assert_close(max(peaks), products + old_values if peaks[-1] == max(peaks) else products)


def test_memory_of_sums_over_domains_is_as_estimated(tmp_path: Path) -> None:
    """Nothing is changed in place, and only the sum is left."""
    run = make_run(tmp_path, METHOD, **NETWORK)
    estimate = make_estimate(run)
    counter = AllocationCounter()
    counter.ignore([*run.network.parameters(), *run.network.buffers()])
    with counter:
        earlier = measure(run)
        kept = dict(earlier.moments)
        copies = {name: moment.clone() for name, moment in kept.items()}
        total = measure(run).accumulate(earlier)
        assert all(kept[name].equal(copy) for name, copy in copies.items())
        assert all(moment.equal(kept[name] * 2) for name, moment in total.moments.items())
        del kept, copies, earlier
    assert_close(counter.num_bytes, estimate.host["moments of inputs"])
    assert len(total.moments) == 10


def test_memory_at_the_end_of_a_domain_is_as_estimated(tmp_path: Path) -> None:
    """The method's hook on one rank, while a checkpoint of what it had before is still being written.

    In one memory: sums over domains, before and after, and the domain's own moments; then a projector at a time.
    """
    run = make_run(tmp_path, METHOD, **NETWORK)
    estimate = make_estimate(run)
    method = build_method(run)
    loops = ResumableLoops(show_progress=False)
    domain = replace(no_text_domain(tmp_path), sample_batches=make_sample(loops).batches)
    domain.folder.mkdir()
    method.before_domain(domain)
    method.after_domain(domain)
    loops.reset()
    counter = AllocationCounter()
    counter.ignore([*run.network.parameters(), *run.network.buffers()])
    written = method.state_dict().owned
    before = sum(moment.nbytes for moment in written.values())
    counter.ignore(written.values())
    with counter:
        method.after_domain(domain)
    host = estimate.host["moments of inputs"] + sum(estimate.host_at_end.values())
    one_projector = 4 * 160**2 + estimate.device_at_start["projector of one input"]
    assert before + counter.peak >= 0.95 * (host + one_projector)
    assert before + counter.peak <= 1.05 * (host + one_projector)


def test_disk_space_is_as_estimated(tmp_path: Path) -> None:
    run = make_run(tmp_path, METHOD, **NETWORK)
    estimate = make_estimate(run)
    importance = measure(run)
    importance.save(tmp_path / "directions.safetensors", ())
    assert_close((tmp_path / "directions.safetensors").stat().st_size, estimate.run)
    # The largest checkpoint: the sum, the latest moments, and the sums of a group that is being measured.
    loops = ResumableLoops(show_progress=False)
    loop = loops.start([0, 1], "inputs")
    loop.num_done = 1
    loop.accumulators = {name: torch.zeros_like(moment) for name, moment in importance.moments.items()}
    states = {"total": importance.state_dict(), "latest": importance.state_dict(), "loops": loops.state_dict()}
    written = immutable_tensors(states, is_main=True)
    assert_close(
        sum(t.nbytes for key, t in written.items() if "rng/" not in key),
        estimate.checkpoint + estimate.checkpoint_of_rank,
    )
