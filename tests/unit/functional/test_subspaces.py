"""Frozen singular directions: by hand, against float64, and against the decomposition of PEFT."""

from __future__ import annotations

import pytest
import torch
from peft import OSFConfig, get_peft_model
from peft.tuners.osf.layer import OSFLayer

from das_ds.functional.subspaces import (
    TwoSidedProjector,
    freeze_leading_directions,
    num_frozen_directions,
    stored_rank,
)
from helpers.tiny_models import tiny_model
from helpers.two_domains import leading_directions, project_out


def side(projector: TwoSidedProjector, name: str) -> torch.Tensor:
    """The matrix of one side."""
    one = getattr(projector, name)
    return one.project(torch.eye(one.width))


def test_project_by_hand_zeroes_rows_and_columns_of_frozen_directions() -> None:
    # The largest singular value is that of the third row and the first column, then the first row and second column.
    weight = torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, 1.0], [5.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    update = torch.arange(1.0, 13.0).view(1, 12)
    one = freeze_leading_directions(weight, 1).project(update).view(4, 3)
    torch.testing.assert_close(
        one, torch.tensor([[0.0, 2.0, 3.0], [0.0, 5.0, 6.0], [0.0, 0.0, 0.0], [0.0, 11.0, 12.0]])
    )
    two = freeze_leading_directions(weight, 2).project(update).view(4, 3)
    torch.testing.assert_close(two, torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 6.0], [0.0, 0.0, 0.0], [0.0, 0.0, 12.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(12, 12), (12, 30), (30, 12), (2, 7)])
def test_project_equals_float64(shape: tuple[int, int], ratio: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    weight, update = (torch.randn(shape, generator=generator) for _ in range(2))
    frozen = num_frozen_directions(*shape, ratio)
    projector = freeze_leading_directions(weight, frozen)
    # Some number of directions less than all.
    left, right = (
        vectors[:, -frozen:] if frozen else vectors[:, :0] for vectors in leading_directions(weight.double(), 0)
    )
    expected = project_out(update.to(dtype).double(), left, right)
    found = projector.project(update.to(dtype).view(1, -1)).view(shape)
    assert found.dtype == dtype
    # Of float32 the digits that gaps between singular values leave.
    tolerance = 1e-4 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    # W's leading part is that of W + dW to first order and exactly: its factors do not see dW.
    torch.testing.assert_close(left.T @ found.double(), left.T.new_zeros(frozen, shape[1]), rtol=0, atol=10 * tolerance)
    assert projector.width == update.numel()
    smaller = min(shape)
    ranks = [stored_rank(size, smaller, frozen) for size in shape]
    assert projector.num_bytes == 4 * sum((size + 1) * rank for size, rank in zip(shape, ranks, strict=True))


def test_project_several_matrices_at_once() -> None:
    generator = torch.Generator().manual_seed(6)
    projector = freeze_leading_directions(torch.randn(5, 8, generator=generator), 3)
    updates = torch.randn(3, 40, generator=generator)
    torch.testing.assert_close(
        projector.project(updates), torch.cat([projector.project(update.view(1, -1)) for update in updates])
    )


@pytest.mark.parametrize(
    ("shape", "ratio", "expected"),
    [((8, 12), 0.25, 6), ((12, 8), 0.5, 4), ((10, 10), 0.25, 7), ((8, 8), 0.0, 7), ((8, 8), 1.0, 0), ((1, 9), 0.5, 0)],
)
def test_num_frozen_directions_is_rounded_down_and_leaves_one(
    shape: tuple[int, int], ratio: float, expected: int
) -> None:
    assert num_frozen_directions(*shape, ratio) == expected


@pytest.mark.parametrize("ratio", [0.25, 0.75])
@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "bert"])
def test_subspaces_are_those_of_peft(model_type: str, ratio: float) -> None:
    """The projectors of both sides, for a network with square, wide and tall matrices, some of them fused."""
    targets = "all-linear" if model_type == "bert" else None
    wrapped = get_peft_model(tiny_model(model_type), OSFConfig(effective_rank=1.0 - ratio, target_modules=targets))
    layers = [module for module in wrapped.modules() if isinstance(module, OSFLayer)]
    assert len(layers) >= 4
    for layer in layers:
        weight = layer.get_base_layer().weight.detach()
        projector = freeze_leading_directions(weight, num_frozen_directions(*weight.shape, ratio))
        for name, high, low in (
            ("left", layer._osf_U_high, layer._osf_U_low_init),
            ("right", layer._osf_V_high, layer._osf_V_low_init),
        ):
            # PEFT keeps the frozen directions only where those that are left do not tell them.
            if "default" in high:
                vectors = high["default"] if name == "left" else high["default"].T
                expected = torch.eye(len(vectors)) - vectors @ vectors.T
            else:
                vectors = low["default"] if name == "left" else low["default"].T
                expected = vectors @ vectors.T
            torch.testing.assert_close(side(projector, name), expected, rtol=0, atol=1e-5)
