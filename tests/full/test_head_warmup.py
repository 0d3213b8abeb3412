"""A missing LM head is trained alone first, at every ZeRO stage, and can be stopped in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, get_scheduler

from das_ds.config import RunConfig
from das_ds.distributed.process_group import RankInfo
from das_ds.models.loading import load_model
from das_ds.reporting.results import Results
from das_ds.training.data_module import prepare_data
from helpers.head_warmup import RATE, STEPS, headless_run, weights_after_warmup
from helpers.resume import assert_same_run, run_in_pieces
from helpers.run_ranks import run_ranks
from helpers.runs import metrics_lines, run_all

pytestmark = pytest.mark.multirank


def by_plain_torch(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The same with transformers' own loss and torch's own optimizer, which gets the head alone."""
    config = RunConfig(**values)
    model, _ = load_model(config.model, seed=config.seed, vocab_size=config_size(values))
    text = prepare_data(config, RankInfo(0, 0, 1, torch.device("cpu")), "mlm")
    train = config.train
    head = dict(model.lm_head.named_parameters())
    head = {name: p for name, p in head.items() if p is not model.get_input_embeddings().weight}
    groups = [
        {"params": [p for p in head.values() if p.dim() > 1], "weight_decay": train.weight_decay},
        {"params": [p for p in head.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=train.betas, eps=train.eps)
    schedule = get_scheduler(train.lr_scheduler, optimizer, round(train.warmup_ratio * STEPS), STEPS)
    for micro_batches in list(text.training_steps(config.stages[0]))[:STEPS]:
        total = sum(batch.num_predicted for batch in micro_batches)
        for batch in micro_batches:
            labels = torch.full_like(batch.corrupted_ids, -100).flatten()
            labels[batch.predicted] = batch.targets
            labels = labels.view_as(batch.corrupted_ids)
            loss = model(batch.corrupted_ids, labels=labels).loss
            (loss * batch.num_predicted / total).backward()
        optimizer.step()
        schedule.step()
        model.zero_grad()
    return {name: weight.detach() for name, weight in model.named_parameters()}


def config_size(values: dict[str, Any]) -> int:
    return int(AutoModelForMaskedLM.from_pretrained(values["model"]["name_or_path"]).config.vocab_size)


@pytest.mark.parametrize(
    ("stage", "optimizer"), [(0, "adamw"), (2, "adamw"), (2, "cpu_adam"), (3, "adamw"), (3, "cpu_adam")]
)
def test_the_head_alone_moves_and_as_torch_moves_it(stage: int, optimizer: str, tmp_path: Path) -> None:
    # Clipping would mix in the gradient of the tied embeddings, which stay as they are.
    values = headless_run(
        tmp_path, stage=stage, train={"max_grad_norm": 0.0, "micro_batch_size": 2, "optimizer": optimizer}
    )
    expected = by_plain_torch(values)
    begin = load_model(RunConfig(**values).model, seed=values["seed"], vocab_size=config_size(values))[0]
    for found in run_ranks(weights_after_warmup, 2, values):
        for name, start in begin.named_parameters():
            if name.startswith("lm_head."):
                torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
                assert not torch.equal(found[name], start), name
            else:
                assert torch.equal(found[name], start), name


@pytest.mark.parametrize("stage", [2, 3])
def test_a_warmup_in_pieces_equals_the_complete_warmup(stage: int, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "train": {"micro_batch_size": 2, "steps_per_domain": 2, "precision": "bf16"},
        "checkpoint": {"interval": 1, "async_save": False},
        "evaluation": {"batch_size": 1, "max_sequences": 4},
        "method": {"name": "ncl"},
    }
    runs = [
        headless_run(tmp_path, stage=stage, output_dir=tmp_path / name, **changes) for name in ("complete", "parts")
    ]
    run_ranks(run_all, 2, runs[:1])
    _, breaks = run_ranks(run_in_pieces, 2, runs[1], 2)[0]
    assert [place for place in breaks if place[0] == "head_warmup"]
    assert_same_run(tmp_path / "parts", tmp_path / "complete")
    lines = metrics_lines(tmp_path / "complete")
    assert [(line["domain"], line["global_step"]) for line in lines[:3]] == [
        ("head_warmup", 2),
        ("head_warmup", 4),
        ("head_warmup", 5),
    ]
    weights = Results.read(tmp_path / "complete" / "results.json").weights
    assert weights is not None and "lm_head.dense.weight" in weights.drawn and weights.dtypes == ["float32"]


def test_warmup_lowers_the_loss_of_the_base(tmp_path: Path) -> None:
    runs = [
        headless_run(
            tmp_path,
            stage=2,
            steps=steps,
            output_dir=tmp_path / str(steps),
            method={"name": "ncl"},
            train={"steps_per_domain": 1},
        )
        for steps in (0, 20)
    ]
    fresh, trained = run_ranks(run_all, 1, runs)[0]
    assert all(a > b for a, b in zip(fresh.loss_matrix[0], trained.loss_matrix[0], strict=True))
