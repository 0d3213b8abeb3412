"""Exports of complete runs: loaded by plain transformers, and the start of each domain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from das_ds.config import RunConfig
from das_ds.distributed.process_group import RankInfo
from das_ds.training.data_module import prepare_data
from helpers.run_ranks import run_ranks
from helpers.runs import (
    evaluate_export,
    exported_weights,
    run_all,
    small_run,
)

pytestmark = pytest.mark.multirank


def test_exported_model_has_losses_of_last_row(tmp_path: Path) -> None:
    values = small_run(tmp_path, deepspeed={"zero_optimization": {"stage": 3}})
    results = run_ranks(run_all, 1, [values])[0][0]
    folder = tmp_path / "run" / "domains" / "01_papers" / "model"
    found = run_ranks(evaluate_export, 2, values, folder)[0]
    assert list(found.values()) == pytest.approx(results.loss_matrix[-1], rel=1e-6)
    assert _plain_losses(values, folder) == pytest.approx(results.loss_matrix[-1], rel=1e-5)


def _plain_losses(values: dict[str, Any], folder: Path) -> list[float]:
    """Losses by transformers' own model and loss only, one sequence at a time."""
    config = RunConfig(**values)
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    assert len(AutoTokenizer.from_pretrained(folder)) == model.config.vocab_size
    text = prepare_data(config, RankInfo(0, 0, 1, torch.device("cpu")), "mlm")
    losses = []
    for corpus in text.blocks:
        total = 0.0
        count = 0
        for batch in text.evaluation_batches(corpus):
            labels = torch.full_like(batch.input_ids, -100).flatten()
            labels[batch.predicted] = batch.targets
            for ids, row in zip(batch.corrupted_ids, labels.view_as(batch.input_ids), strict=True):
                predicted = int((row != -100).sum())
                if predicted:
                    with torch.no_grad():
                        total += model(input_ids=ids[None], labels=row[None]).loss.item() * predicted
                    count += predicted
        losses.append(total / count)
    return losses


def test_method_one_starts_each_domain_from_base(tmp_path: Path) -> None:
    both = small_run(tmp_path, method={"name": "one"}, output_dir=tmp_path / "both")
    alone = small_run(tmp_path, method={"name": "ncl"}, output_dir=tmp_path / "alone", domains=both["domains"][1:])
    run_ranks(run_all, 2, [{**run, "train": {**run["train"], "micro_batch_size": 2}} for run in (both, alone)])
    mine = exported_weights(tmp_path / "both", "01_papers")
    theirs = exported_weights(tmp_path / "alone", "00_papers")
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
