"""Scaling many tensors at once, in torch and in Triton, against the formula in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from das_ds.functional.masks import SegmentTable
from das_ds.kernels.masked_scale import MaskedScale, masked_scale_torch_
from das_ds.kernels.protection import Protection
from helpers.protections import KINDS, inside_poison, is_poison_untouched, new_seed, random_protection

pytestmark = pytest.mark.usefixtures("small_tiles")

SIZES = (1, 300, 127, 128, 1003, 5)
# One rounding of the product. Triton's interpreter cuts bfloat16 off where a GPU rounds to the nearest.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-11}


def in_triton(tensors: Sequence[torch.Tensor], protections: Sequence[Protection]) -> None:
    from das_ds.kernels.masked_scale_triton import ScaleLaunch

    ScaleLaunch(protections, tensors[0].device)(tensors)


FORMS = {"torch": masked_scale_torch_, "triton": in_triton}


def make_protections(kind: str, generator: torch.Generator, device: str) -> list[Protection]:
    """One per size; those by units share one vector of values, as a run's do."""
    drawn = [random_protection(kind, numel, generator, device) for numel in SIZES]
    tables = [protection.table for protection in drawn if protection.table is not None]
    if not tables:
        return drawn
    longest = max((table.values for table in tables), key=len)
    return [Protection(t.numel, table=SegmentTable(t.numel, t.segments, longest)) for t in tables]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_masked_scale_equals_float64(form: str, kind: str, dtype: torch.dtype, device: str) -> None:
    seed = new_seed()
    generator = torch.Generator().manual_seed(seed)
    protections = make_protections(kind, generator, device)
    start = [torch.randn(numel, generator=generator).to(dtype) for numel in SIZES]
    poisoned = [inside_poison(values.to(device)) for values in start]
    FORMS[form]([view for _, view in poisoned], protections)
    for before, (full, view), protection in zip(start, poisoned, protections, strict=True):
        share = 1 - protection.to_dense().double().cpu()
        message = f"{kind}, {dtype}, {protection.numel} elements, seed {seed}"
        found = view.double().cpu()
        expected = before.double() * share
        torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=1e-6, msg=message)
        assert torch.equal(found[share == 1], before.double()[share == 1]), message
        assert not found[share == 0].any(), message
        assert is_poison_untouched(full, view), message


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([torch.zeros(3)], "found 1, expected 2, one per protection"),
        ([torch.zeros(3), torch.zeros(5)], r"tensor 1: found shape \(5,\), expected \(4,\)"),
        ([torch.zeros(3), torch.zeros(4).double()], "tensor 1: found torch.float64, allowed: torch.float32, torch.bf"),
        (
            [torch.zeros(3), torch.zeros(4).half()],
            "tensor 1: found torch.float16 on cpu, expected torch.float32 on cpu",
        ),
        ([torch.zeros(3), torch.zeros(8)[::2]], "tensor 1: found strides"),
    ],
)
def test_masked_scale_wrong_tensors_raise(tensors: list[torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskedScale([Protection(3), Protection(4)])(tensors)


def test_masked_scale_no_tensors() -> None:
    MaskedScale([])([])
