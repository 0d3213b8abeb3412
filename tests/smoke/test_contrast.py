"""Contrast over the global batch: ranks together equal one rank with the joined batch, gradients included."""

from __future__ import annotations

import pytest
import torch

from helpers import reference
from helpers.contrast import loss_and_gradients
from helpers.run_ranks import run_ranks


@pytest.mark.multirank
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_equal_the_joined_batch(world_size: int) -> None:
    views = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(0))
    joined = views.double().requires_grad_()
    loss = reference.contrastive_loss(*joined, temperature=0.05)
    (expected,) = torch.autograd.grad(loss, joined)
    results = run_ranks(loss_and_gradients, world_size, views)
    assert sum(value for value, _ in results) / world_size == pytest.approx(loss.item(), rel=1e-5)
    found = torch.cat([gradient for _, gradient in results], dim=1)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-6)
