"""Which epoch is the best, and when to give up waiting for a better one."""

from __future__ import annotations


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
