"""Fine-tuning: toy tasks are learned, results are deterministic by seed, the best epoch is scored."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from das_ds.config import ModelConfig, TaskConfig
from das_ds.downstream import finetune
from das_ds.downstream.finetune import fine_tune
from das_ds.downstream.scores import Scores, SeedScores
from das_ds.downstream.tasks import read_task
from das_ds.errors import TrainingError
from helpers.end_tasks import save_model, small_task

CPU = torch.device("cpu")


def tuned(folder: Path, model: Path, kind: str = "text", seed: int = 0, **changes: object) -> SeedScores:
    task = read_task(TaskConfig(**small_task(folder, kind, **changes)))
    return fine_tune(task, seed, ModelConfig(name_or_path=str(model)), CPU, show=False)


@pytest.mark.parametrize(
    ("model_type", "kind"), [("bert", "text"), ("roberta", "text"), ("bert", "pair"), ("roberta", "entities")]
)
def test_fine_tune_learns_separable_rows(tmp_path: Path, model_type: str, kind: str) -> None:
    model = save_model(tmp_path, model_type)
    train = small_task(tmp_path, kind)["train"]
    scores = tuned(tmp_path, model, kind, dev=train, test=train, epochs=20, patience=20)
    assert scores.dev == scores.test == Scores(accuracy=1.0, macro_f1=1.0, micro_f1=1.0)


def test_fine_tune_is_deterministic_by_seed(tmp_path: Path) -> None:
    model = save_model(tmp_path)
    first = tuned(tmp_path, model, learning_rate=1e-3, epochs=2)
    other = tuned(tmp_path, model, learning_rate=1e-3, epochs=2, seed=1)
    assert tuned(tmp_path, model, learning_rate=1e-3, epochs=2) == first
    assert (other.dev, other.test) != (first.dev, first.test)


def test_fine_tune_scores_best_epoch_and_stops_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Dev scores as if written down: epoch 2 is the best, two worse ones follow.
    dev_scores = iter([0.4, 0.7, 0.6, 0.5, 0.9])
    weights_at: list[dict[str, torch.Tensor]] = []
    score = finetune._FineTuning._score

    def scripted(job: finetune._FineTuning, encoded: object) -> Scores:
        weights_at.append({name: value.clone() for name, value in job._model.state_dict().items()})
        if encoded is job._dev:
            return Scores(accuracy=0.0, macro_f1=next(dev_scores), micro_f1=1.0)
        return score(job, encoded)  # type: ignore[arg-type]

    monkeypatch.setattr(finetune._FineTuning, "_score", scripted)
    scores = tuned(tmp_path, save_model(tmp_path), epochs=5, patience=2)
    assert (scores.epochs, scores.best_epoch, scores.dev.macro_f1) == (4, 2, 0.7)
    tested = weights_at[-1]
    assert all(torch.equal(tested[name], value) for name, value in weights_at[1].items())
    assert any(not torch.equal(tested[name], value) for name, value in weights_at[3].items())


def test_fine_tune_nonfinite_loss_raises(tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"task toy_text, seed 0: the loss of epoch 1 is nan, .*tasks.learning_rate"
    ):
        tuned(tmp_path, save_model(tmp_path), learning_rate=1e30)


def test_fine_tune_warns_of_truncated_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = read_task(TaskConfig(**small_task(tmp_path, sequence_length=8, epochs=1)))
    source = ModelConfig(name_or_path=str(save_model(tmp_path)))
    with caplog.at_level(logging.WARNING):
        fine_tune(task, 0, source, CPU, show=True)
    assert "rows of more than 8 tokens are truncated: 40 of train, 12 of dev, 16 of test" in caplog.text


def test_fine_tune_on_terminal_shows_task_seed_and_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("das_ds.progress.is_terminal", lambda: True)
    task = read_task(TaskConfig(**small_task(tmp_path, epochs=1)))
    fine_tune(task, 3, ModelConfig(name_or_path=str(save_model(tmp_path))), CPU, show=True)
    assert "toy_text, seed 3, epoch 1" in capsys.readouterr().err
