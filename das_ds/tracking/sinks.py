"""Metric sinks: the interface, and the JSONL file that every run writes."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from das_ds.errors import RunFolderError
from das_ds.run_dir import LAST_STEP_FILE
from das_ds.storage import atomic_write
from das_ds.tracking.names import GLOBAL_STEP

logger = logging.getLogger(__name__)

Scalar = float | int | str
Metrics = Mapping[str, Scalar]


class Sink:
    """Receives the metrics of a run; a sink overrides the methods that it supports and ignores the rest."""

    drops_steps = False
    """Whether `truncate_after` drops steps. False: logged steps stay, so that they are not logged again."""

    def log(self, metrics: Metrics, *, global_step: int) -> None:
        """Log a training step: the fields of `names.STEP_METRICS`, and any others."""

    def log_evaluation(self, losses: Mapping[str, float], *, domains_learned: int, global_step: int) -> None:
        """Log the held-out loss per corpus, before training (`domains_learned` 0) or after a domain."""

    def log_domain_evaluation(self, metrics: Metrics, *, global_step: int) -> None:
        """Log an evaluation within a domain: `names.EVALUATION_METRICS`, and the `names.eval_loss` of every corpus."""

    def log_summary(self, metrics: Metrics) -> None:
        """Log metrics of the complete run, such as its average forgetting."""

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Scalar]]) -> None:
        """Log a table with one name per column."""

    def log_image(self, name: str, path: Path) -> None:
        """Log a PNG file."""

    def num_bytes(self) -> int:
        """Length of the sink's file, 0 without one."""
        return 0

    def last_step(self) -> int:
        """Last global step that was ever logged to the sink's file, 0 without one."""
        return 0

    def truncate_after(self, global_step: int, num_bytes: int | None = None) -> None:
        """Drop all that was logged after a checkpoint; called when a run resumes there.

        Args:
            global_step: last step to keep.
            num_bytes: value of `num_bytes()` when the checkpoint was saved; None: everything up to `global_step` is
                kept.
        """

    def close(self, exit_code: int = 0) -> None:
        """Flush and release resources; nothing is logged afterwards."""


class JsonlSink(Sink):
    """Appends one strict JSON object per logged step to a file, flushed line by line.

    JSON has no NaN or infinity, so these become the strings "NaN", "Infinity" and "-Infinity", which `float()` parses.

    Raises:
        RunFolderError: the file cannot be opened or written.
    """

    drops_steps = True

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("a+b")
        except OSError as error:
            raise self._cannot_write(error) from error

    def log(self, metrics: Metrics, *, global_step: int) -> None:
        """Append one line, `global_step` first."""
        fields = {GLOBAL_STEP: global_step, **metrics}
        line = json.dumps({name: _strict(value) for name, value in fields.items()}, allow_nan=False)
        try:
            self._file.write(line.encode() + b"\n")
            self._file.flush()
        except OSError as error:
            # Closing flushes the line again; a second failure would hide this one.
            with contextlib.suppress(OSError):
                self._file.close()
            raise self._cannot_write(error) from error

    def log_domain_evaluation(self, metrics: Metrics, *, global_step: int) -> None:
        """Append one line, as for a step."""
        self.log(metrics, global_step=global_step)

    def num_bytes(self) -> int:
        """Length of the file."""
        # By path, because a failed write closes the file.
        return self._path.stat().st_size

    def last_step(self) -> int:
        """Last global step of all lines, also of those that were dropped."""
        steps = [_parse_step(line) for line in self._path.read_bytes().splitlines()]
        record = self._path.with_name(LAST_STEP_FILE)
        if record.exists() and (text := record.read_text().strip()).isdecimal():
            steps.append(int(text))
        return int(max((step for step in steps if step < math.inf), default=0))

    def truncate_after(self, global_step: int, num_bytes: int | None = None) -> None:
        """Cut the file at the first line that is after `global_step`, not among the first `num_bytes`, or incomplete.

        The number of bytes tells apart what was logged before and after a checkpoint within an evaluation. Lines that
        existed when the step was saved but are gone cannot be recovered, which is logged as a warning.
        """
        end = 0
        try:
            if (last_step := self.last_step()) > global_step:
                with atomic_write(self._path.with_name(LAST_STEP_FILE)) as partial:
                    partial.write_text(f"{last_step}\n")
            self._file.seek(0)
            for line in self._file:
                is_later = _parse_step(line) > global_step or (num_bytes is not None and end + len(line) > num_bytes)
                if is_later or not line.endswith(b"\n"):
                    break
                end += len(line)
            self._file.truncate(end)
        except OSError as error:
            raise self._cannot_write(error) from error
        if num_bytes is not None and end < num_bytes:
            logger.warning(
                "%s: %d bytes of lines up to step %d are missing and cannot be recovered; training continues",
                self._path,
                num_bytes - end,
                global_step,
            )

    def close(self, exit_code: int = 0) -> None:
        """Close the file."""
        self._file.close()

    def _cannot_write(self, error: OSError) -> RunFolderError:
        return RunFolderError(
            f"{self._path}: cannot be written ({error.strerror}); the run folder must be writable and have free space"
        )


def _strict(value: Scalar) -> Scalar:
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    return value


def _parse_step(line: bytes) -> float:
    """Global step of a line; infinite if the line is not a JSON object with a step."""
    try:
        return int(json.loads(line)[GLOBAL_STEP])
    except (ValueError, TypeError, KeyError):
        return math.inf
