"""Vectors of gradients and updates times their projector, wherever shards cut them, against complete products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from das_ds.distributed.neighbor_exchange import Exchanges
from das_ds.distributed.state import Shard
from das_ds.engine.matmul_precision import tf32
from das_ds.engine.optimizer import MaskedAdamW, MaskedOptimizer, MaskedUpdateWrapper
from das_ds.functional.projectors import DenseProjector
from das_ds.softmask import cut_vectors, direction_mask, mask_layout, projection, update_chunks
from das_ds.softmask.direction_mask import DirectionDecayMask, build_decay_masks, build_direction_mask
from das_ds.softmask.direction_update_mask import DirectionUpdateMask, build_update_masks
from das_ds.softmask.masked_matrix import MaskedMatrix
from helpers.direction_masks import (
    CPU,
    CUTS,
    MATRICES,
    SHAPES,
    TOLERANCE,
    check_gradients,
    collect,
    cut_values,
    layouts_of,
    make_projectors,
    mask_gradients,
    masks_of,
    multiply,
    random_values,
    run_together,
)

SOME_RANKS = (*range(1, 10), 13, 31, 64, 97)


@pytest.mark.parametrize("cut", CUTS)
def test_apply_any_number_of_ranks_equals_complete_product(cut: str) -> None:
    """`tests/full/test_direction_masks.py` goes through all of them."""
    for num_ranks in SOME_RANKS:
        check_gradients(cut, num_ranks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_apply_in_16_bits_rounds_products_once(dtype: torch.dtype) -> None:
    values = {name: value.to(dtype) for name, value in random_values(1).items()}
    expected = multiply(values, make_projectors())
    for num_ranks in (1, 2, 5, 40):
        found, _ = mask_gradients("flat", num_ranks, values)
        for name, value in expected.items():
            rounding = torch.finfo(dtype).eps * value.abs() + 1e-5
            assert ((found[name] - value).abs() <= rounding).all(), f"{name} on {num_ranks} ranks"


@pytest.mark.parametrize("limit", [1, 20, 100])
def test_apply_in_bounded_memory_equals_complete_product(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small products, and many rounds of exchanges."""
    values = random_values(1)
    expected = multiply(values, make_projectors())
    monkeypatch.setattr(projection, "MAX_PRODUCT_ELEMENTS", limit)
    monkeypatch.setattr(mask_layout, "MAX_ROUND_ELEMENTS", limit)
    for num_ranks in (1, 2, 3, 7, 30):
        found, _ = mask_gradients("by parameter", num_ranks, values)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, **TOLERANCE)


def test_rounds_stay_below_limit_but_for_one_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_layout, "MAX_ROUND_ELEMENTS", 20)
    for layouts in (layouts_of(CUTS["flat"](num_ranks)) for num_ranks in (2, 3, 7, 30)):
        assert len({len(layout.rounds) for layout in layouts}) == 1
        for layout in layouts:
            for cut in layout.rounds:
                names = {fragment.block.matrix.name for fragment in cut.sent}
                assert max(sum(cut.send_sizes), sum(cut.receive_sizes)) <= 20 or len(names) <= 1


def test_owners_of_transposed_vectors_share_them_equally() -> None:
    layouts = layouts_of(CUTS["by parameter"](2))
    completed = [sum(cut.num_vectors.get("hidden", 0) for cut in layout.rounds) for layout in layouts]
    # Four columns of `conv` among two ranks, and the middle rows of `query` and `key` on one of them.
    assert sorted(completed) == [2, 4] or completed == [3, 3]


@pytest.mark.parametrize("limit", [1, 16, 1 << 22])
@pytest.mark.parametrize("cut", CUTS)
def test_update_mask_any_number_of_ranks_equals_complete_product(
    cut: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update_chunks, "MAX_CHUNK_ELEMENTS", limit)
    before, steps = random_values(1), random_values(2)
    projectors = make_projectors()
    expected = {name: before[name].double() + step for name, step in multiply(steps, projectors).items()}
    for num_ranks in (*range(1, 12), 23, 48, 97):
        shards_by_rank = CUTS[cut](num_ranks)
        finishing = []
        for shards, layout in zip(shards_by_rank, layouts_of(shards_by_rank), strict=True):
            if not shards:
                finishing.append(DirectionUpdateMask(shards, layout, projectors, CPU, 0).finish_steps(torch.zeros(0)))
                continue
            flat = shards[0].flat
            mask = DirectionUpdateMask(shards, layout, projectors, CPU, flat.numel())
            for shard in shards:
                shard.values.copy_(before[shard.name].flatten()[shard.param_span])
            moved = {shard.name: steps[shard.name].flatten()[shard.param_span] for shard in shards}
            position = 0
            for chunk in mask.chunks():
                assert chunk.start == position
                position = chunk.stop
                assert chunk.stop - chunk.start <= max(limit, 31)
                old = flat.data[chunk].clone()
                step = torch.zeros(flat.numel())
                for shard in shards:
                    step[shard.span] = moved[shard.name]
                flat.data[chunk] += step[chunk]
                mask.blend_(flat.data[chunk], old, chunk)
            assert position == flat.numel()
            finishing.append(mask.finish_steps(flat.data))
        run_together(finishing)
        found = collect(shards_by_rank, [[shard.values for shard in shards] for shards in shards_by_rank])
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, **TOLERANCE, msg=f"{name} on {num_ranks} ranks")


@pytest.mark.parametrize("decay", [1e-6, 0.1])
def test_decay_mask_step_decays_through_projector(decay: float) -> None:
    before = random_values(1)
    projectors = make_projectors()
    products = multiply(before, projectors)
    for num_ranks in (1, 2, 5, 33):
        shards_by_rank = CUTS["flat"](num_ranks)
        flats = [shards[0].flat for shards in shards_by_rank]
        for shards in shards_by_rank:
            for shard in shards:
                shard.values.copy_(before[shard.name].flatten()[shard.param_span])
        masks = masks_of(shards_by_rank, projectors)
        steps: list[Exchanges] = []
        with pytest.MonkeyPatch.context() as patched:
            # What `compensate_` would run on real ranks.
            patched.setattr(direction_mask, "run_exchanges", steps.append)
            for shards, mask, flat in zip(shards_by_rank, masks, flats, strict=True):
                DirectionDecayMask(shards, mask).compensate_(flat.data, decay)
        run_together(steps)
        for flat in flats:
            flat.data *= 1.0 - decay
        found = collect(shards_by_rank, [[shard.values for shard in shards] for shards in shards_by_rank])
        masked = {matrix.parameter for matrix in MATRICES} - {"embeddings"}
        for name in masked:
            torch.testing.assert_close(found[name], before[name].double() - decay * products[name], **TOLERANCE)
        # What is not masked decays as ever, here all of these.
        torch.testing.assert_close(found["norm"], (1.0 - decay) * before["norm"].double(), **TOLERANCE)


def test_apply_wrong_tensors_are_refused() -> None:
    shards = CUTS["flat"](1)[0]
    mask = masks_of([shards], make_projectors())[0]
    with pytest.raises(ValueError, match=r"tensors: found sizes \[1\], expected \[5, 35, .*one tensor per shard"):
        mask.apply_([torch.zeros(1)])
    tensors = [torch.zeros(shard.numel, dtype=torch.float16 if i else None) for i, shard in enumerate(shards)]
    with pytest.raises(ValueError, match=r"tensors: found types torch.float16, torch.float32, expected one type"):
        mask.apply_(tensors)


def test_build_masks_group_flat_tensors_with_masked_matrices() -> None:
    flat, other = (torch.nn.Parameter(torch.zeros(4)) for _ in range(2))
    shards = [Shard("w", flat, 0, 0, 4), Shard("free", other, 0, 0, 4)]
    matrices = [MaskedMatrix("w", "w", 0, 2, 2, "x")]
    projectors = {"x": DenseProjector(torch.eye(2))}
    flats = {"w": flat, "free": other}
    assert list(build_update_masks(shards, flats, matrices, projectors, CPU)) == [flat]
    assert list(build_decay_masks(shards, flats, matrices, projectors, CPU)) == [flat]


def test_matrices_with_one_input_are_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    project = DenseProjector.project

    def watch(self: DenseProjector, vectors: torch.Tensor) -> torch.Tensor:
        seen.append(len(vectors))
        return project(self, vectors)

    monkeypatch.setattr(DenseProjector, "project", watch)
    flat = torch.nn.Parameter(torch.zeros(12))
    shards = [Shard("w", flat, 0, 0, 4), Shard("v", flat, 4, 0, 6)]
    matrices = [MaskedMatrix("w", "w", 0, 2, 2, "x"), MaskedMatrix("v", "v", 0, 3, 2, "x")]
    build_direction_mask(shards, matrices, {"x": DenseProjector(torch.eye(2))}, CPU).apply_(
        [torch.ones(4), torch.ones(6)]
    )
    assert seen == [5]


def test_products_are_in_tf32_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    project = DenseProjector.project

    def watch(self: DenseProjector, vectors: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return project(self, vectors)

    for module in (direction_mask, cut_vectors):
        monkeypatch.setattr(module, "tf32", lambda device: tf32(torch.device("cuda")))
    monkeypatch.setattr(DenseProjector, "project", watch)
    flat = torch.nn.Parameter(torch.ones(10))
    # One rank that has the two halves of a row in two shards, and a complete row.
    shards = [Shard("w", flat, 0, 0, 3), Shard("w", flat, 4, 3, 1)]
    matrices = [MaskedMatrix("w", "w", 0, 2, 2, "x")]
    mask = build_direction_mask(shards, matrices, {"x": DenseProjector(torch.eye(2))}, CPU)
    mask.apply_([torch.ones(3), torch.ones(1)])
    assert seen == ["high", "high"] and torch.get_float32_matmul_precision() == "highest"


class SyncCounter(TorchDispatchMode):
    """Counts what makes a host wait for a device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default or func is torch.ops.aten.nonzero.default
        return func(*args, **(kwargs or {}))


def test_apply_waits_for_no_device() -> None:
    shards_by_rank = CUTS["flat"](3)
    masks = masks_of(shards_by_rank, make_projectors())
    gradients = cut_values(shards_by_rank, random_values(1))
    with SyncCounter() as counter:
        run_together([m.steps(g, torch._foreach_copy_) for m, g in zip(masks, gradients, strict=True)])
    assert counter.count == 0


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]]], MaskedOptimizer]] = {
    "fused": lambda groups: MaskedAdamW(groups, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1),
    "wrapped": lambda groups: MaskedUpdateWrapper(torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)),
    "sgd": lambda groups: MaskedUpdateWrapper(torch.optim.SGD(groups, lr=1e-2, momentum=0.9, weight_decay=0.1)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_update_mask_steps_of_any_optimizer_are_multiplied(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_chunks, "MAX_CHUNK_ELEMENTS", 16)
    shards = CUTS["flat"](1)[0]
    flat = shards[0].flat
    assert isinstance(flat, torch.nn.Parameter)
    projectors = make_projectors()
    before = random_values(1)
    for shard in shards:
        shard.values.copy_(before[shard.name].flatten())
    twin = torch.nn.Parameter(flat.detach().clone())
    flats = {shard.name: flat for shard in shards}
    masked = OPTIMIZERS[name]([{"params": [flat]}])
    plain = OPTIMIZERS[name]([{"params": [twin]}])
    masked.set_masks(build_update_masks(shards, flats, MATRICES, projectors, CPU))
    for seed in (5, 6, 7):
        flat.grad = torch.randn(flat.shape, generator=torch.Generator().manual_seed(seed))
        twin.grad = flat.grad.clone()
        old = twin.detach().clone()
        masked.step()
        plain.step()
        steps = {shard.name: (twin.data - old)[shard.span].view(SHAPES[shard.name]) for shard in shards}
        masked_steps = multiply(steps, projectors)
        for shard in shards:
            twin.data[shard.span] = old[shard.span] + masked_steps[shard.name].flatten().float()
            torch.testing.assert_close(shard.values, twin.data[shard.span], **TOLERANCE)
