"""Fine-tuning one model on one end task with one seed, on a single rank."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable

import torch
from torch import nn
from transformers import get_linear_schedule_with_warmup

from das_ds.config import ModelConfig, TaskConfig
from das_ds.distributed.process_group import seed_everything
from das_ds.downstream.batches import EncodedRows, TaskBatch, encode_examples, shuffled_batches, sorted_batches
from das_ds.downstream.classifier import Classifier, check_task_length, load_classifier
from das_ds.downstream.metrics import accuracy, confusion_matrix, macro_f1, micro_f1
from das_ds.downstream.scores import Scores, SeedScores
from das_ds.downstream.tasks import EndTask
from das_ds.errors import TrainingError
from das_ds.progress import Progress

logger = logging.getLogger(__name__)

MAX_GRAD_NORM = 1.0


def fine_tune(
    task: EndTask,
    seed: int,
    source: ModelConfig,
    device: torch.device,
    *,
    tokenizer_folder: str | None = None,
    show: bool,
) -> SeedScores:
    """Train a classifier until the dev score stops improving, and score its best epoch.

    All random numbers follow from the seed, so that a job's result does not depend on the jobs before it.

    Args:
        task: rows and settings.
        seed: of the head's weights, the order of rows, and dropout.
        source: the model to start from.
        device: where to train.
        tokenizer_folder: where the tokenizer is; None: with the model.
        show: show a progress bar, and warn of truncated rows.

    Raises:
        DasError: the model cannot be used, or the loss is not finite.
    """
    seed_everything(seed)
    markers = task.config.markers if task.config.kind == "entities" else []
    classifier = load_classifier(source, task.labels, markers, tokenizer_folder)
    check_task_length(source, classifier.model, task.config.sequence_length, task.config.name)
    return _FineTuning(task, seed, classifier, device, show=show).run()


class _FineTuning:
    """One training, with its classifier, batches and optimizer."""

    def __init__(self, task: EndTask, seed: int, classifier: Classifier, device: torch.device, *, show: bool) -> None:
        self._config = task.config
        self._seed = seed
        self._device = device
        self._show = show
        self._num_classes = len(task.labels)
        model: nn.Module = classifier.model
        self._model = model.to(device)
        self._tokenizer = classifier.tokenizer
        self._train = encode_examples(task.train, self._tokenizer, self._config.sequence_length)
        self._dev = encode_examples(task.dev, self._tokenizer, self._config.sequence_length)
        self._test = encode_examples(task.test, self._tokenizer, self._config.sequence_length)
        self._steps_per_epoch = math.ceil(len(self._train.rows) / self._config.batch_size)
        num_steps = self._steps_per_epoch * self._config.epochs
        self._optimizer = _build_optimizer(self._model, self._config)
        self._lr_scheduler = get_linear_schedule_with_warmup(
            self._optimizer, round(self._config.warmup_ratio * num_steps), num_steps
        )
        self._order_generator = torch.Generator().manual_seed(seed)

    def run(self) -> SeedScores:
        if self._show:
            self._warn_of_truncation()
        stopping = EarlyStopping(self._config.patience)
        best_weights: dict[str, torch.Tensor] = {}
        best_dev: Scores | None = None
        while stopping.epochs < self._config.epochs and not stopping.is_over:
            self._train_epoch(stopping.epochs + 1)
            dev = self._score(self._dev)
            if stopping.update(dev.value(self._config.metric)):
                best_weights = copy.deepcopy(self._model.state_dict())
                best_dev = dev
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
        batches = shuffled_batches(self._train, self._config.batch_size, self._tokenizer, self._order_generator)
        for batch in self._with_progress(batches, epoch):
            loss = nn.functional.cross_entropy(self._logits(batch), batch.labels.to(self._device))
            loss.backward()
            nn.utils.clip_grad_norm_(self._model.parameters(), MAX_GRAD_NORM)
            self._optimizer.step()
            self._lr_scheduler.step()
            self._optimizer.zero_grad(set_to_none=True)
            total += loss.detach()
        # Once per epoch: `item` at every step would make the host wait for the device.
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

    def _with_progress(self, batches: Iterable[TaskBatch], epoch: int) -> Iterable[TaskBatch]:
        label = f"{self._config.name}, seed {self._seed}, epoch {epoch}"
        return Progress(batches, label, self._steps_per_epoch, unit="steps", show=self._show)

    def _warn_of_truncation(self) -> None:
        splits = {"train": self._train, "dev": self._dev, "test": self._test}
        if any(encoded.num_truncated for encoded in splits.values()):
            logger.warning(
                "task %s: rows of more than %d tokens are truncated: %s (tasks.sequence_length)",
                self._config.name,
                self._config.sequence_length,
                ", ".join(f"{encoded.num_truncated} of {split}" for split, encoded in splits.items()),
            )


class EarlyStopping:
    """Finds the first epoch with the highest score, and stops after `patience` epochs without a higher one.

    Args:
        patience: epochs without a higher score that end the training.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._best_score = float("-inf")
        self.best_epoch = 0
        """Counted from 1; 0 before the first score."""
        self.epochs = 0
        """Epochs scored so far."""

    def update(self, score: float) -> bool:
        """Record the score of the next epoch; returns whether it is the highest so far."""
        self.epochs += 1
        if score <= self._best_score:
            return False
        self._best_score = score
        self.best_epoch = self.epochs
        return True

    @property
    def is_over(self) -> bool:
        """Whether the last `patience` epochs brought no higher score."""
        return self.epochs - self.best_epoch >= self._patience


def _build_optimizer(model: nn.Module, config: TaskConfig) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only, not on biases and norms."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate)
