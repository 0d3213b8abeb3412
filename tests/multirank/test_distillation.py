"""Teachers at every ZeRO stage: bit for bit the model of their time, no larger than they have to be; and method kd."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from das_ds.config import RunConfig
from das_ds.data.batches import Batch
from helpers.distillation import TeacherFacts, teach_and_train
from helpers.parity import EPS, NUM_STEPS, configs_of, relative_difference, steps
from helpers.run_ranks import run_ranks
from helpers.tiny_models import NO_DROPOUT, tiny_model

pytestmark = pytest.mark.multirank

KD = {"name": "kd", "kd": {"weight": 3.0, "temperature": 2.0}}
# With a threshold of 0 every parameter is divided, with 30 vectors of up to that size stay whole.
THRESHOLDS = (0, 30)


def kd_configs(folder: Path, zero: dict[str, Any], precision: str) -> RunConfig:
    return configs_of(folder, 2, zero, [KD], precision)[0]


def expected_elements(stage: int, threshold: int, num_ranks: int = 2) -> int:
    sizes = [weight.numel() for weight in tiny_model().parameters()]
    if stage < 3:
        return sum(sizes)
    return sum(-(-size // num_ranks) + (size if size <= threshold else 0) for size in sizes)


@cache
def reference() -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    """Weights and both losses of every step, of kd as plain torch gives it in float64, on one process."""
    student = tiny_model(**NO_DROPOUT).double()
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    parameters = dict(student.named_parameters())
    matrices, vectors = ([p for p in parameters.values() if (p.dim() > 1) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, eps=EPS)
    mlm, distillation = [], []
    for number, step in enumerate(steps()):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (NUM_STEPS - number) / NUM_STEPS
        predicted = sum(_token_loss(student, batch) for batch in step)
        mlm.append(predicted / sum(batch.num_predicted for batch in step))
        distillation.append(sum(_divergence(teacher, student, batch) for batch in step) / len(step))
        optimizer.zero_grad()
        (mlm[-1] + distillation[-1]).backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), 0.5)
        optimizer.step()
    weights = {name: value.detach() for name, value in parameters.items()}
    return weights, [loss.item() for loss in mlm], [loss.item() for loss in distillation]


def _token_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    logits = model(input_ids=batch.corrupted_ids).logits.flatten(0, 1)[batch.predicted]
    return functional.cross_entropy(logits, batch.targets, reduction="sum")


def _divergence(teacher: PreTrainedModel, student: PreTrainedModel, batch: Batch) -> torch.Tensor:
    weight, temperature = 3.0, 2.0
    old, new = (model.base_model(input_ids=batch.corrupted_ids).last_hidden_state for model in (teacher, student))
    p, q = functional.softmax(old / temperature, dim=-1), functional.softmax(new / temperature, dim=-1)
    return weight * temperature**2 * (p * (p / q).log()).sum(dim=-1).mean()


@pytest.mark.parametrize("stage", range(4))
def test_teachers_are_exact_and_kd_equals_plain_torch(stage: int, tmp_path: Path) -> None:
    zeros = [{"stage": stage, "stage3_param_persistence_threshold": threshold} for threshold in THRESHOLDS]
    settings = [(zeros[0], "bf16"), (zeros[1], "fp32"), (zeros[1], "fp16")][: 2 if stage == 0 else 3]
    beside = [kd_configs(tmp_path, zero, precision) for zero, precision in settings]
    results = run_ranks(teach_and_train, 2, beside, beside[1:2], steps(), NO_DROPOUT)
    for facts, _ in results:
        for found, (zero, precision) in zip(facts, settings, strict=True):
            size = expected_elements(stage, zero["stage3_param_persistence_threshold"])
            assert found == TeacherFacts(True, True, True, True, size), precision
    weights, mlm, distillation = reference()
    (found_weights, lines), *_ = results[0][1]
    assert relative_difference(found_weights, weights) <= 1e-5
    assert [line["loss/mlm"] for line in lines] == pytest.approx(mlm, rel=1e-5)
    # At first the teacher is the student.
    assert lines[0]["loss/distillation"] == pytest.approx(0.0, abs=1e-6) and distillation[-1] > 0.01
    assert [line["loss/distillation"] for line in lines] == pytest.approx(distillation, rel=1e-4, abs=1e-6)
