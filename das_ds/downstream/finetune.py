"""Which epoch is the best, and when to give up waiting for a better one.

Fine-tuning one model on one end task with one seed; a job of its own, alone on its rank.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable

import torch
from torch import nn
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup

from das_ds.config import ModelConfig, TaskConfig
from das_ds.distributed.process_group import seed_everything
from das_ds.downstream.batches import EncodedRows, TaskBatch, encode_examples, shuffled_batches, sorted_batches
from das_ds.downstream.classifier import Classifier, check_task_length, load_classifier
from das_ds.downstream.metrics import accuracy, confusion_matrix, macro_f1, micro_f1
from das_ds.downstream.scores import Scores, SeedScores
from das_ds.downstream.tasks import EndTask
from das_ds.errors import TrainingError


class EarlyStopping:
    """The first epoch with the highest score; over once `patience` epochs in a row were no better.

    Args:
        patience: epochs without a better score that end the training.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._best_score = float("-inf")
        self.best_epoch = 0
        """Counted from 1; 0 before the first score."""
        self.epochs = 0
        """Epochs scored so far."""

    def take(self, score: float) -> bool:
        """Take the score of the next epoch; whether it is higher than all before."""
        self.epochs += 1
        if score <= self._best_score:
            return False
        self._best_score, self.best_epoch = score, self.epochs
        return True

    @property
    def is_over(self) -> bool:
        """Whether patience has run out."""
        return self.epochs - self.best_epoch >= self._patience


logger = logging.getLogger(__name__)

LARGEST_GRADIENT_NORM = 1.0


def fine_tune(task: EndTask, seed: int, source: ModelConfig, device: torch.device, *, show: bool) -> SeedScores:
    """Train a classifier until dev gets no better, and score it as it was at its best.

    Everything random follows from the seed, so that a job gives the same whatever was done before it.

    Args:
        task: rows and settings.
        seed: of the head's weights, the order of rows and dropout.
        source: the model to begin with.
        device: where to train.
        show: show a progress bar, and warn of rows that are cut.

    Raises:
        DasError: the model cannot be used, or the loss is no longer finite.
    """
    seed_everything(seed)
    markers = task.config.markers if task.config.kind == "entities" else []
    classifier = load_classifier(source, task.labels, markers)
    check_task_length(source, classifier.model, task.config.sequence_length, task.config.name)
    return _Job(task, seed, classifier, device, show=show).run()


class _Job:
    def __init__(self, task: EndTask, seed: int, classifier: Classifier, device: torch.device, *, show: bool) -> None:
        self._config, self._seed, self._device, self._show = task.config, seed, device, show
        self._num_classes = len(task.labels)
        network: nn.Module = classifier.model
        self._model = network.to(device)
        self._tokenizer = classifier.tokenizer
        self._train, self._dev, self._test = (
            encode_examples(examples, self._tokenizer, self._config.sequence_length)
            for examples in (task.train, task.dev, task.test)
        )
        self._steps_per_epoch = math.ceil(len(self._train.rows) / self._config.batch_size)
        num_steps = self._steps_per_epoch * self._config.epochs
        self._optimizer = _optimizer(self._model, self._config)
        self._schedule = get_linear_schedule_with_warmup(
            self._optimizer, round(self._config.warmup_ratio * num_steps), num_steps
        )
        self._order = torch.Generator().manual_seed(seed)

    def run(self) -> SeedScores:
        if self._show:
            self._warn_of_cut_rows()
        stopping = EarlyStopping(self._config.patience)
        best_weights, best_dev = {}, None
        while stopping.epochs < self._config.epochs and not stopping.is_over:
            self._train_epoch(stopping.epochs + 1)
            dev = self._score(self._dev)
            if stopping.take(dev.of(self._config.metric)):
                best_weights, best_dev = copy.deepcopy(self._model.state_dict()), dev
        assert best_dev is not None
        self._model.load_state_dict(best_weights)
        return SeedScores(
            seed=self._seed,
            epochs=stopping.epochs,
            best_epoch=stopping.best_epoch,
            dev=best_dev,
            test=self._score(self._test),
        )

    def _train_epoch(self, epoch: int) -> None:
        self._model.train()
        total = torch.zeros((), device=self._device)
        batches = shuffled_batches(self._train, self._config.batch_size, self._tokenizer, self._order)
        for batch in self._shown(batches, epoch):
            loss = nn.functional.cross_entropy(self._logits(batch), batch.labels.to(self._device))
            loss.backward()
            nn.utils.clip_grad_norm_(self._model.parameters(), LARGEST_GRADIENT_NORM)
            self._optimizer.step()
            self._schedule.step()
            self._optimizer.zero_grad(set_to_none=True)
            total += loss.detach()
        # Once an epoch: asking at every step would make the host wait for the device.
        if not math.isfinite(total.item()):
            raise TrainingError(
                f"task {self._config.name}, seed {self._seed}: the loss of epoch {epoch} is {total.item()}, expected a "
                "finite number; lower tasks.learning_rate"
            )

    @torch.no_grad()
    def _score(self, encoded: EncodedRows) -> Scores:
        self._model.eval()
        predicted = torch.empty(len(encoded.rows), dtype=torch.int64)
        for batch in sorted_batches(encoded, self._config.batch_size, self._tokenizer):
            predicted[batch.positions] = self._logits(batch).argmax(dim=-1).cpu()
        counts = confusion_matrix(torch.tensor(encoded.labels), predicted, self._num_classes)
        return Scores(accuracy=accuracy(counts), macro_f1=macro_f1(counts), micro_f1=micro_f1(counts))

    def _logits(self, batch: TaskBatch) -> torch.Tensor:
        inputs = {name: values.to(self._device) for name, values in batch.inputs.items()}
        logits: torch.Tensor = self._model(**inputs).logits
        return logits

    def _shown(self, batches: Iterable[TaskBatch], epoch: int) -> Iterable[TaskBatch]:
        label = f"{self._config.name}, seed {self._seed}, epoch {epoch}"
        return tqdm(batches, label, self._steps_per_epoch, disable=not self._show, unit="step", dynamic_ncols=True)

    def _warn_of_cut_rows(self) -> None:
        cut = {"train": self._train.num_cut, "dev": self._dev.num_cut, "test": self._test.num_cut}
        if any(cut.values()):
            logger.warning(
                "task %s: rows of more than %d tokens are cut: %s (tasks.sequence_length)",
                self._config.name,
                self._config.sequence_length,
                ", ".join(f"{count} of {part}" for part, count in cut.items()),
            )


def _optimizer(model: nn.Module, config: TaskConfig) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate)
