"""The optimizers that DeepSpeed steps, against torch's own and the update rule written out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from das_ds.config import TrainConfig
from das_ds.engine import mask as masks
from das_ds.engine.mask import ElementwiseMask
from das_ds.engine.optimizer import MaskedAdamW, MaskedOptimizer, MaskedUpdateWrapper, build_optimizer
from das_ds.kernels.protection import Protection
from helpers.optimizers import NUM_STEPS, NUMEL, Make, check_pulled_back_in_chunks
from helpers.optimizers import run_steps as run

INNER: dict[str, Make] = {
    "sgd": partial(torch.optim.SGD, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "adamw": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
    "rmsprop": partial(torch.optim.RMSprop, lr=1e-2, momentum=0.9),
    "nadam": partial(torch.optim.NAdam, lr=1e-2),
}


@pytest.mark.parametrize("name", INNER)
def test_wrapper_any_optimizer_blends_in_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_pulled_back_in_chunks(INNER[name], monkeypatch)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_wrapper_without_mask_equals_inner_optimizer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "CHUNK_TILES", 1)
    start = torch.randn(NUMEL)
    param = torch.nn.Parameter(start.clone())
    twin = torch.nn.Parameter(start.clone())
    run(MaskedUpdateWrapper(INNER[name]([{"params": [param]}])), param)
    run(INNER[name]([{"params": [twin]}]), twin)
    assert torch.equal(param.data, twin.data)


def masked_adamw(groups: list[dict[str, Any]]) -> MaskedOptimizer:
    return MaskedAdamW(groups, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)


def test_masked_adamw_equals_scaled_adamw_steps() -> None:
    start = torch.randn(6, 50)
    importance = torch.rand(300)
    param = torch.nn.Parameter(start.clone())
    twin = torch.nn.Parameter(start.clone())
    found = masked_adamw([{"params": [param]}])
    found.set_masks({param: ElementwiseMask(Protection(300, importance=importance))})
    run(found, param)
    run(INNER["adamw"]([{"params": [twin]}]), twin, importance.view(6, 50))
    torch.testing.assert_close(param.data, twin.data, rtol=1e-5, atol=1e-6)
    assert set(found.state[param]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("make", [masked_adamw, lambda groups: MaskedUpdateWrapper(INNER["adamw"](groups))])
def test_mask_without_decay_is_that_of_the_first_moment(make: Callable[..., MaskedOptimizer]) -> None:
    """Masked gradients in the first moment, unmasked ones in the second, and complete decay, written out in float64."""
    start = torch.randn(6, 50)
    importance = torch.rand(300)
    importance[:20] = 1.0
    importance[20:40] = 0.0
    param = torch.nn.Parameter(start.clone())
    optimizer = make([{"params": [param]}])
    optimizer.set_masks({param: ElementwiseMask(Protection(300, importance=importance))}, masks_decay=False)
    run(optimizer, param)
    expected, scale = start.double(), 1 - importance.view(6, 50).double()
    m, v = torch.zeros_like(expected), torch.zeros_like(expected)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, NUM_STEPS + 1):
        gradient = torch.randn(6, 50, generator=generator).double()
        m = 0.9 * m + 0.1 * scale * gradient
        v = 0.999 * v + 0.001 * gradient**2
        expected -= 1e-2 * 0.1 * expected
        expected -= 1e-2 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    torch.testing.assert_close(param.data.double(), expected, rtol=1e-5, atol=1e-6)
    # Protected weights decay, and do nothing else.
    decayed = start.flatten()[:20] * (1 - 1e-3) ** NUM_STEPS
    torch.testing.assert_close(param.data.flatten()[:20], decayed, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("make", [masked_adamw, lambda groups: MaskedUpdateWrapper(INNER["adamw"](groups))])
@pytest.mark.parametrize("kind", ["abs_grad", "squared_grad", "grad_x_weight"])
def test_accumulate_importance_sums_scores_and_steps_nothing(make: Callable[..., MaskedOptimizer], kind: Any) -> None:
    start = torch.randn(40)
    param = torch.nn.Parameter(start.clone())
    optimizer = make([{"params": [param]}])
    sums = {param: torch.zeros(40)}
    gradients = [torch.randn(40), torch.randn(40)]
    with optimizer.accumulate_importance(sums, kind):
        for gradient in gradients:
            param.grad = gradient.clone()
            optimizer.step()
        optimizer.set_grad_scale(torch.tensor(4.0))
        param.grad = gradients[0].clone()
        optimizer.step()
    summands = [gradients[0], gradients[1], gradients[0] / 4]
    if kind == "squared_grad":
        summands = [gradient**2 for gradient in summands]
    elif kind == "grad_x_weight":
        summands = [gradient * start for gradient in summands]
    expected = torch.stack(summands).abs().sum(0)
    torch.testing.assert_close(sums[param], expected)
    assert torch.equal(param.data, start) and not optimizer.state[param]
    optimizer.set_grad_scale(None)
    optimizer.step()
    assert not torch.equal(param.data, start)


@pytest.mark.parametrize("make", [masked_adamw, lambda groups: MaskedUpdateWrapper(INNER["adamw"](groups))])
def test_reset_state_repeats_first_steps(make: Callable[..., MaskedOptimizer]) -> None:
    start = torch.randn(40)
    ends = []
    param = torch.nn.Parameter(start.clone())
    optimizer = make([{"params": [param]}])
    for _ in range(2):
        param.data.copy_(start)
        run(optimizer, param)
        ends.append(param.detach().clone())
        optimizer.reset_state()
    assert torch.equal(*ends)


class HalfMask:
    """Half of every update, stepped in two chunks."""

    finished = 0

    def chunks(self) -> Iterator[slice]:
        yield from (slice(0, 150), slice(150, 300))

    def blend_(self, new: torch.Tensor, old: torch.Tensor, chunk: slice) -> None:
        new.lerp_(old, 0.5)

    def finish_(self, flat: torch.Tensor) -> None:
        self.finished += flat.numel()


@pytest.mark.parametrize("make", [masked_adamw, lambda groups: MaskedUpdateWrapper(INNER["adamw"](groups))])
def test_set_masks_any_update_mask_blends_chunks(make: Callable[..., MaskedOptimizer]) -> None:
    start = torch.randn(300)
    param = torch.nn.Parameter(start.clone())
    twin = torch.nn.Parameter(start.clone())
    masked = make([{"params": [param]}])
    masked.set_masks({param: HalfMask()})
    run(masked, param)
    run(INNER["adamw"]([{"params": [twin]}]), twin, torch.full((300,), 0.5))
    torch.testing.assert_close(param.data, twin.data, rtol=1e-5, atol=1e-6)


def test_set_masks_replaces_earlier_masks() -> None:
    param, twin = (torch.nn.Parameter(torch.ones(300)) for _ in range(2))
    masked = masked_adamw([{"params": [param]}])
    free = masked_adamw([{"params": [twin]}])
    masked.set_masks({param: HalfMask()})
    masked.set_masks({})
    run(masked, param)
    run(free, twin)
    assert torch.equal(param.data, twin.data)


@pytest.mark.parametrize("make", [masked_adamw, lambda groups: MaskedUpdateWrapper(INNER["adamw"](groups))])
def test_step_finishes_mask_once_after_its_chunks(make: Callable[..., MaskedOptimizer]) -> None:
    param = torch.nn.Parameter(torch.ones(300))
    masked = make([{"params": [param]}])
    mask = HalfMask()
    masked.set_masks({param: mask})
    run(masked, param)
    assert mask.finished == 300 * NUM_STEPS


@pytest.mark.parametrize("make", [masked_adamw, lambda groups: MaskedUpdateWrapper(INNER["adamw"](groups))])
def test_set_frozen_spans_keep_their_values_under_masks_and_decay(make: Callable[..., MaskedOptimizer]) -> None:
    start = torch.randn(300)
    param, twin = (torch.nn.Parameter(start.clone()) for _ in range(2))
    some, free = (make([{"params": [p], "weight_decay": 0.1}]) for p in (param, twin))
    for optimizer, p in ((some, param), (free, twin)):
        optimizer.set_masks({p: HalfMask()})
    some.set_frozen({param: [slice(0, 10), slice(140, 170)]})
    run(some, param)
    run(free, twin)
    expected = twin.detach().clone()
    for span in (slice(0, 10), slice(140, 170)):
        expected[span] = start[span]
    assert param.detach().equal(expected)
    some.set_frozen({})
    run(some, param)
    assert not param[:10].detach().equal(start[:10])


class QuarterDecay:
    """Three of four elements do not decay."""

    def compensate_(self, weights: torch.Tensor, decay: float) -> None:
        kept = weights.clone()
        kept[::4] = 0.0
        weights += decay / (1.0 - decay) * kept


@pytest.mark.parametrize("make", [masked_adamw, lambda groups: MaskedUpdateWrapper(INNER["adamw"](groups))])
def test_set_decay_masks_decay_is_that_of_open_elements(make: Callable[..., MaskedOptimizer]) -> None:
    start = torch.randn(300)
    param, open_twin, closed_twin = (torch.nn.Parameter(start.clone()) for _ in range(3))
    masked = make([{"params": [param]}])
    masked.set_decay_masks({param: QuarterDecay()})
    run(masked, param)
    run(INNER["adamw"]([{"params": [open_twin]}]), open_twin)
    run(torch.optim.AdamW([closed_twin], lr=1e-2, weight_decay=0.0), closed_twin)
    torch.testing.assert_close(param.data[::4], open_twin.data[::4], rtol=1e-5, atol=1e-6)
    for first in (1, 2, 3):
        torch.testing.assert_close(param.data[first::4], closed_twin.data[first::4], rtol=1e-5, atol=1e-6)


def test_decay_mask_without_weight_decay_is_not_used() -> None:
    param = torch.nn.Parameter(torch.ones(8))
    masked = MaskedAdamW([{"params": [param]}], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    masked.set_decay_masks({param: None})  # type: ignore[dict-item]
    param.grad = torch.ones(8)
    masked.step()
    assert (param != 1.0).all()


def test_groups_by_layer_have_decaying_rates() -> None:
    matrices = {"embedding": (9, 3), "first": (3, 3), "second": (3, 3), "head": (3, 9)}
    shapes: dict[str, tuple[int, ...]] = {**matrices, "first.bias": (3,), "head.bias": (9,)}
    depths = {"embedding": 0, "first": 1, "first.bias": 1, "second": 2, "head": 3, "head.bias": 3, "frozen": 3}
    parameters = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    names = {parameter: name for name, parameter in parameters.items()}

    def groups(decay: float) -> list[tuple[list[str], float, float]]:
        optimizer = build_optimizer(parameters, TrainConfig(layer_lr_decay=decay), on_host=True, depths=depths)
        return [
            ([names[p] for p in group["params"]], group["lr_scale"], group["weight_decay"])
            for group in optimizer.param_groups
        ]

    assert groups(0.5) == [
        (["head"], 1.0, 0.01),
        (["second"], 0.5, 0.01),
        (["first"], 0.25, 0.01),
        (["embedding"], 0.125, 0.01),
        (["head.bias"], 1.0, 0.0),
        (["first.bias"], 0.25, 0.0),
    ]
    assert groups(1.0) == [
        (["embedding", "first", "second", "head"], 1.0, 0.01),
        (["first.bias", "head.bias"], 1.0, 0.0),
    ]


def test_step_counts_of_flats_that_were_not_saved_are_ignored() -> None:
    """Flat tensors with only padding on a rank are not in a checkpoint; theirs start anew."""
    flats = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizer = masked_adamw([{"params": flats}])
    moments = {key: {flats[0]: torch.ones(4)} for key in ("exp_avg", "exp_avg_sq")}
    optimizer.load_moments(moments, {"step": 7.0})
    for flat in flats:
        flat.grad = torch.ones(4)
    optimizer.step()
    assert optimizer.moments()[1] == {"step": 8.0}
    with optimizer.accumulate_importance({flats[0]: torch.zeros(4)}, "abs_grad"):
        optimizer.step()
