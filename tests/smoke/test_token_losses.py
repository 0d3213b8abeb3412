"""Chunked LM loss under ZeRO, with different numbers of positions per rank, compared with plain autograd."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from helpers.run_ranks import run_ranks
from helpers.token_losses import (
    CHUNK,
    POSITIONS,
    VOCABULARY,
    Gradients,
    gradients_in_engine,
    inputs,
    language_model,
    weighted,
)
from helpers.training import run_config

pytestmark = pytest.mark.multirank

AT_ONCE = 1000


@cache
def reference(model_type: str) -> dict[str, torch.Tensor]:
    """Averaged gradient from all logits at once, in float64."""
    model = language_model(model_type).double()
    for step in range(len(POSITIONS)):
        for rank in range(2):
            input_ids, predicted, targets = inputs(step, rank)
            logits = model(input_ids).logits.flatten(0, 1)[predicted]
            losses = functional.cross_entropy(logits, targets, reduction="none")
            (weighted(losses, targets) / (2 * len(POSITIONS))).backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def errors(found: list[Gradients], expected: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Relative error of the gradient, put together from the shards of all ranks: overall and of the worst parameter.

    The softmax of attention does not see a key's bias, so that its gradient is only rounding: excluded.
    """
    full = {name: torch.zeros(value.numel(), dtype=torch.float64) for name, value in expected.items()}
    for shards in found:
        for name, offset, values in shards:
            full[name][offset : offset + values.numel()] = values.view(-1).double()
    seen = {name: value.flatten() for name, value in expected.items() if not name.endswith("key.bias")}
    of_all = torch.cat([full[name] for name in seen]) - torch.cat(list(seen.values()))
    return (
        float(of_all.norm() / torch.cat(list(seen.values())).norm()),
        max(float((full[name] - value).norm() / value.norm()) for name, value in seen.items()),
    )


@pytest.mark.parametrize(
    ("stage", "precision", "allowed"),
    [(0, "fp32", 1e-6), (1, "fp32", 1e-6), (2, "fp32", 1e-6), (3, "fp32", 1e-6), (3, "bf16", 0.02)],
)
def test_chunked_lm_loss_zero_gradients_equal_unchunked(
    stage: int, precision: str, allowed: float, tmp_path: Path
) -> None:
    # Persistent vectors would stay complete and hide weights left gathered.
    zero = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
    train = {
        "micro_batch_size": 3,
        "global_batch_size": 6 * len(POSITIONS),
        "max_grad_norm": 0.0,
        "precision": precision,
    }
    config = run_config(
        tmp_path, train=train, deepspeed={"zero_optimization": zero}, model={"gradient_checkpointing": stage == 3}
    )
    forms = [
        ("roberta", AT_ONCE, False, None),
        ("roberta", CHUNK, False, None),
        ("roberta", CHUNK, True, None),
        # All rows, but by a view of the weight, as where rows are reserved for later tokens.
        ("roberta", CHUNK, False, VOCABULARY),
        ("gpt2", CHUNK, False, None),
    ]
    results = run_ranks(gradients_in_engine, 2, config, forms)
    for index, (model_type, *_) in enumerate(forms):
        as_a_complete, worst = errors([rank[index][0] for rank in results], reference(model_type))
        assert as_a_complete <= allowed and worst <= 3.0 * allowed, (forms[index], as_a_complete, worst)
    for rank in results:
        for form in (1, 2, 3):
            torch.testing.assert_close(rank[form][1], rank[0][1], rtol=10 * allowed, atol=10 * allowed)
