"""Callbacks of the training loops: named no-ops that a run overrides to save, stop, and watch itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoggedStep:
    """Optimizer step whose metrics were logged."""

    domain: str
    step: int
    """Number in the domain, from 1."""
    num_steps: int
    """Steps of the domain."""
    steps_since_last: int
    """Steps since the logged step before, this one included."""
    seconds: float
    """Time that these steps took, without checkpoints."""
    loss: float
    learning_rate: float
    tokens_per_s: float


class Callbacks:
    """Extension points of the loops over steps and batches; each does nothing by default."""

    def on_progress(self, location: str, step: int) -> None:
        """Called several times per step.

        Args:
            location: the next action of the loop, in words.
            step: number of the current step, from 1.
        """

    def on_step_end(self, step: int) -> bool:
        """Called after every optimizer step of a domain but the last, with the number of steps done.

        Returns:
            Whether the domain ends there.
        """
        return False

    def on_step_logged(self, logged: LoggedStep) -> str:
        """Called after metrics were logged; returns the text that the progress bar shows."""
        return f"loss={logged.loss:.3f}"

    def on_batch_end(self) -> None:
        """Called between two batches of a resumable loop (importance, evaluation)."""

    def extra_metrics(self) -> dict[str, float]:
        """Metrics to add to the next logged line."""
        return {}
