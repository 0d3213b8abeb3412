"""Trackio as a metric sink: its local database, or the server or Space that its environment variables name."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from das_ds.config import RunConfig
from das_ds.config.io import resolved_dict
from das_ds.run_dir import TRACKIO_RUN_NAME_FILE
from das_ds.tracking.names import DOMAINS_LEARNED, eval_loss, name_by_domain, name_within_domain
from das_ds.tracking.run_ids import group_name, run_name, store_run_id, stored_run_id
from das_ds.tracking.sinks import Metrics, Scalar, Sink

PROJECT = "das_ds"


class TrackioSink(Sink):
    """One Trackio run per training run, continued on resume; metrics over the global step.

    Trackio continues runs by their name, so the name has a random ending, which the run folder keeps.

    Args:
        config: of the run.
        library: the `trackio` module.
    """

    def __init__(self, config: RunConfig, library: Any) -> None:
        self._library = library
        self._step = 0
        name = stored_run_id(config.output_dir, TRACKIO_RUN_NAME_FILE)
        if name is None:
            folder = re.sub(r"[^A-Za-z0-9_.-]", "_", run_name(config))[:100]
            name = f"{folder}-{secrets.token_hex(4)}"
            store_run_id(config.output_dir, name, TRACKIO_RUN_NAME_FILE)
        self._run = library.init(
            project=PROJECT,
            name=name,
            group=group_name(config),
            config=resolved_dict(config),
            resume="allow",
            embed=False,
        )

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
        """Log a table as `tables/<name>`."""
        self._add({f"tables/{name}": self._library.Table(columns=columns, data=rows)}, self._step)

    def log_image(self, name: str, path: Path) -> None:
        """Log a PNG file as `images/<name>`."""
        self._add({f"images/{name}": self._library.Image(str(path))}, self._step)

    def close(self, exit_code: int = 0) -> None:
        """Flush and finish the run."""
        self._run.finish()

    def _add(self, values: Mapping[str, Any], global_step: int) -> None:
        self._step = global_step
        self._run.log(dict(values), step=global_step)
