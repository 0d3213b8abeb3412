"""Tracker: one object on every rank that forwards metrics to sinks, which only rank 0 has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from das_ds.config import RunConfig
from das_ds.errors import EXIT_STOPPED, DasError, StoppedError
from das_ds.run_dir import METRICS_FILE
from das_ds.tracking.libraries import build_job_sink, build_library_sinks
from das_ds.tracking.sinks import JsonlSink, Metrics, Scalar, Sink
from das_ds.tracking.wandb_sink import WandbJob


class Tracker(Sink):
    """Forwards everything to its sinks; without sinks it does nothing, so callers need not check their rank.

    As a context manager it closes the sinks with the exit code of the block.
    """

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self._sinks = tuple(sinks)
        self._last_logged = 0
        """Last step that the sinks had before the run was resumed or rolled back to an earlier step."""
        self.failure: DasError | None = None
        """Why steps can no longer be logged. Only rank 0 logs, so the trainer raises it later on all ranks."""

    def log(self, metrics: Metrics, *, global_step: int) -> None:
        """Forward a training step; nothing after a `failure`."""
        self._log_line(lambda sink: sink.log(metrics, global_step=global_step), global_step, self._last_logged)

    def log_domain_evaluation(self, metrics: Metrics, *, global_step: int) -> None:
        """Forward an evaluation within a domain; nothing after a `failure`."""
        # The last step may be logged without its evaluation, which is the same when it is logged twice.
        self._log_line(
            lambda sink: sink.log_domain_evaluation(metrics, global_step=global_step),
            global_step,
            self._last_logged - 1,
        )

    def _log_line(self, log: Callable[[Sink], None], global_step: int, last_kept: int) -> None:
        if self.failure is not None:
            return
        try:
            for sink in self._sinks:
                # A sink that keeps what it has would show this step twice.
                if sink.drops_steps or global_step > last_kept:
                    log(sink)
        except DasError as error:
            self.failure = error

    def log_evaluation(self, losses: Mapping[str, float], *, domains_learned: int, global_step: int) -> None:
        """Forward held-out losses."""
        for sink in self._sinks:
            sink.log_evaluation(losses, domains_learned=domains_learned, global_step=global_step)

    def log_summary(self, metrics: Metrics) -> None:
        """Forward metrics of the complete run."""
        for sink in self._sinks:
            sink.log_summary(metrics)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Scalar]]) -> None:
        """Forward a table."""
        for sink in self._sinks:
            sink.log_table(name, columns, rows)

    def log_image(self, name: str, path: Path) -> None:
        """Forward a PNG file."""
        for sink in self._sinks:
            sink.log_image(name, path)

    def num_bytes(self) -> int:
        """Length of metrics.jsonl, 0 on other ranks than 0."""
        return max((sink.num_bytes() for sink in self._sinks), default=0)

    def last_step(self) -> int:
        """Last global step that was logged; 0 on other ranks than 0."""
        return max((sink.last_step() for sink in self._sinks), default=0)

    def truncate_after(self, global_step: int, num_bytes: int | None = None) -> None:
        """Drop all that was logged after a checkpoint in every sink, or log nothing that is there already."""
        self._last_logged = self.last_step()
        for sink in self._sinks:
            sink.truncate_after(global_step, num_bytes)

    def close(self, exit_code: int = 0) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close(exit_code)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(_exit_code(error))


def build_tracker(config: RunConfig, *, enabled: bool) -> Tracker:
    """Build the tracker of a run: JSONL and the libraries of `config.tracking`; empty unless `enabled` (rank 0).

    Raises:
        RunFolderError: `metrics.jsonl` cannot be opened; the run folder must exist.
        ConfigError: a library that the config asks for is not installed.
    """
    if not enabled:
        return Tracker()
    # JSONL first: a step that another sink has is then in the file.
    return Tracker([JsonlSink(config.output_dir / METRICS_FILE), *build_library_sinks(config)])


def build_job_tracker(config: RunConfig, job: WandbJob, *, enabled: bool) -> Tracker:
    """Build the tracker of a job other than training: only W&B, if the run logs to it; empty unless `enabled`.

    Raises:
        ConfigError: the config asks for W&B, which is not installed.
    """
    sink = build_job_sink(config, job) if enabled else None
    return Tracker([] if sink is None else [sink])


def _exit_code(error: BaseException | None) -> int:
    if error is None:
        return 0
    if isinstance(error, StoppedError):
        return EXIT_STOPPED
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 1
