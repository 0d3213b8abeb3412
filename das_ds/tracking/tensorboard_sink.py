"""TensorBoard as a metric sink: event files in the run folder, over the global step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import yaml

from das_ds.config import RunConfig
from das_ds.config.io import resolved_dict
from das_ds.run_dir import TENSORBOARD_FOLDER
from das_ds.tracking.names import DOMAINS_LEARNED, GLOBAL_STEP, eval_loss, name_by_domain, name_within_domain
from das_ds.tracking.sinks import Metrics, Scalar, Sink

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardSink(Sink):
    """One folder of event files per run.

    A start writes a file of its own, which tells TensorBoard from which step on earlier files no longer count.
    """

    drops_steps = True

    def __init__(self, config: RunConfig) -> None:
        self._folder = config.output_dir / TENSORBOARD_FOLDER
        self._config = config
        self._step = 0
        self._purge_step: int | None = None
        self._open_writer: SummaryWriter | None = None

    def log(self, metrics: Metrics, *, global_step: int) -> None:
        """Log a step as `<domain>/...`."""
        self._add(name_by_domain(metrics), global_step)

    def log_evaluation(self, losses: Mapping[str, float], *, domains_learned: int, global_step: int) -> None:
        """Log `eval/<corpus>`."""
        row = {eval_loss(corpus): loss for corpus, loss in losses.items()}
        self._add({**row, DOMAINS_LEARNED: domains_learned}, global_step)

    def log_domain_evaluation(self, metrics: Metrics, *, global_step: int) -> None:
        """Log `within/eval/<corpus>`."""
        self._add(name_within_domain(metrics), global_step)

    def log_summary(self, metrics: Metrics) -> None:
        """Log metrics of the run so far as `summary/...`."""
        self._add({f"summary/{name}": value for name, value in metrics.items()}, self._step)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Scalar]]) -> None:
        """Log a table as text in Markdown."""
        lines = [columns, ["---"] * len(columns), *rows]
        text = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
        self._writer.add_text(f"tables/{name}", text, self._step)

    def log_image(self, name: str, path: Path) -> None:
        """Log a PNG file as `images/<name>`."""
        from PIL import Image

        with Image.open(path) as image:
            pixels = numpy.asarray(image.convert("RGB"))
        self._writer.add_image(f"images/{name}", pixels, self._step, dataformats="HWC")

    def truncate_after(self, global_step: int, num_bytes: int | None = None) -> None:
        """Hide all later steps of earlier files."""
        self.close()
        self._purge_step = global_step + 1
        self._step = global_step

    def close(self, exit_code: int = 0) -> None:
        """Flush and close the file."""
        if self._open_writer is not None:
            self._open_writer.close()
            self._open_writer = None

    @property
    def _writer(self) -> SummaryWriter:
        """The file of this start, which the first call creates."""
        if self._open_writer is None:
            from torch.utils.tensorboard import SummaryWriter

            is_new = not self._folder.exists()
            self._open_writer = SummaryWriter(str(self._folder), purge_step=self._purge_step)
            if is_new:
                text = yaml.safe_dump(resolved_dict(self._config), sort_keys=False, allow_unicode=True)
                # An indented block is shown as it is.
                self._open_writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()))
        return self._open_writer

    def _add(self, metrics: Mapping[str, Scalar], global_step: int) -> None:
        self._step = global_step
        for name, value in metrics.items():
            if name != GLOBAL_STEP and not isinstance(value, str):
                self._writer.add_scalar(name, value, global_step)
        # Lines may be minutes apart, and a killed run should not lose the last ones.
        self._writer.flush()
