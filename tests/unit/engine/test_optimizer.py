"""The optimizers that DeepSpeed steps, against torch's own and the update rule written out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from das_ds.engine import optimizer as optimizers
from das_ds.engine.loss_scaler import tf32
from das_ds.engine.optimizer import MaskedAdamW, MaskedOptimizer, MaskedUpdateWrapper
from das_ds.kernels.protection import Protection
from helpers.optimizers import NUMEL, Make, check_pulled_back_in_chunks
from helpers.optimizers import run_steps as run

INNER: dict[str, Make] = {
    "sgd": partial(torch.optim.SGD, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "adamw": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
    "rmsprop": partial(torch.optim.RMSprop, lr=1e-2, momentum=0.9),
    "nadam": partial(torch.optim.NAdam, lr=1e-2),
}


@pytest.mark.parametrize("name", INNER)
def test_any_optimizer_is_pulled_back_in_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_pulled_back_in_chunks(INNER[name], monkeypatch)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_without_protection_the_inner_optimizer_steps_as_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "CHUNK_WINDOWS", 1)
    start = torch.randn(NUMEL)
    param, twin = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    run(MaskedUpdateWrapper(INNER[name]([{"params": [param]}])), param)
    run(INNER[name]([{"params": [twin]}]), twin)
    assert torch.equal(param.data, twin.data)


def masked_adamw(groups: list[dict[str, Any]]) -> MaskedOptimizer:
    return MaskedAdamW(groups, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)


def test_masked_adamw_is_adamw_with_a_share_of_its_step() -> None:
    start, importance = torch.randn(6, 50), torch.rand(300)
    param, twin = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    found = masked_adamw([{"params": [param]}])
    found.protect({param: Protection(300, importance=importance)})
    run(found, param)
    run(INNER["adamw"]([{"params": [twin]}]), twin, importance.view(6, 50))
    torch.testing.assert_close(param.data, twin.data, rtol=1e-5, atol=1e-6)
    assert set(found.state[param]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("make", [masked_adamw, lambda groups: MaskedUpdateWrapper(INNER["adamw"](groups))])
@pytest.mark.parametrize("kind", ["abs_grad", "squared_grad", "grad_x_weight"])
def test_measuring_adds_up_and_steps_nothing(make: Callable[..., MaskedOptimizer], kind: Any) -> None:
    start = torch.randn(40)
    param = torch.nn.Parameter(start.clone())
    optimizer = make([{"params": [param]}])
    sums = {param: torch.zeros(40)}
    gradients = [torch.randn(40), torch.randn(40)]
    with optimizer.summing(sums, kind):
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
def test_state_starts_anew(make: Callable[..., MaskedOptimizer]) -> None:
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


def test_products_with_masks_of_rows_are_in_tf32_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorded:
        def remember(self, param: torch.Tensor) -> torch.Tensor:
            return param.clone()

        def mask(self, param: torch.Tensor, old: torch.Tensor) -> None:
            seen.append(torch.get_float32_matmul_precision())

    seen: list[str] = []
    monkeypatch.setattr(optimizers, "tf32", lambda device: tf32(torch.device("cuda")))
    param = torch.nn.Parameter(torch.ones(4))
    param.grad = torch.ones(4)
    masked = MaskedAdamW([{"params": [param]}], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    masked.protect_rows(Recorded())  # type: ignore[arg-type]
    masked.step()
    assert seen == ["high"] and torch.get_float32_matmul_precision() == "highest"
