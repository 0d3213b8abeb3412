"""Weights & Biases as a metric sink, online or offline.

wandb's own service process isolates uploads, but a frozen service blocks every call that logs and the exit of the
interpreter. The sink therefore runs on a background worker, and a service that hangs is ended.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil

from das_ds.config import RunConfig
from das_ds.config.io import resolved_dict
from das_ds.config.stage import stage_name
from das_ds.tracking.background import CLOSE_TIMEOUT_S, BackgroundSink
from das_ds.tracking.names import (
    DOMAINS_LEARNED,
    GLOBAL_STEP,
    eval_loss,
    name_by_domain,
    name_within_domain,
    step_axis,
    within_domain,
)
from das_ds.tracking.run_ids import group_name, run_name, store_run_id, stored_run_id
from das_ds.tracking.sinks import Metrics, Scalar, Sink

INIT_TIMEOUT_S = 30.0
TEARDOWN_TIMEOUT_S = 5.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WandbJob:
    """A W&B run other than that of training, in the same group."""

    folder: Path
    """For its id and files."""
    job_type: str
    name: str
    config: Mapping[str, Any] | None = None
    """Settings to show; None: those of the run config."""


def build_wandb_sink(
    config: RunConfig,
    library: Any,
    job: WandbJob | None = None,
    *,
    init_timeout_s: float = INIT_TIMEOUT_S,
    close_timeout_s: float = CLOSE_TIMEOUT_S,
) -> BackgroundSink:
    """The sink of one W&B run, on a background worker.

    Args:
        config: of the run.
        library: the `wandb` module.
        job: None: the training run itself.
        init_timeout_s: seconds to wait for the server before going offline.
        close_timeout_s: longest time that `close` blocks.
    """
    job = job or WandbJob(config.output_dir, config.method.name, config.wandb.name or run_name(config))
    # Half of what close() grants; the other half is for pending calls.
    timeouts = {"init_timeout": init_timeout_s, "finish_timeout": close_timeout_s / 2}
    return BackgroundSink(
        "W&B",
        partial(WandbSink, config, library, job, timeouts),
        close_timeout_s=close_timeout_s,
        on_abandon=partial(_abandon_service, library, job),
    )


class WandbSink(Sink):
    """One W&B run per training run, with a step axis per domain.

    The id of the W&B run is stored in the run folder and reused on resume. All offline files of a run share that id;
    `wandb sync --append` joins them.

    Args:
        config: of the run.
        library: the `wandb` module.
        job: which W&B run.
        timeouts: settings of `wandb.init` in seconds.
    """

    def __init__(self, config: RunConfig, library: Any, job: WandbJob, timeouts: Mapping[str, float]) -> None:
        self._config = config
        self._job = job
        self._wandb = library
        self._timeouts = timeouts
        self._run = self._start()
        self._define_axes()

    def log(self, metrics: Metrics, *, global_step: int) -> None:
        """Log a step as `<domain>/...`, over `<domain>/step`."""
        self._run.log(name_by_domain({GLOBAL_STEP: global_step, **metrics}))

    def log_evaluation(self, losses: Mapping[str, float], *, domains_learned: int, global_step: int) -> None:
        """Log `eval/<corpus>` over `domains_learned`."""
        row = {eval_loss(corpus): loss for corpus, loss in losses.items()}
        self._run.log({**row, DOMAINS_LEARNED: domains_learned, GLOBAL_STEP: global_step})

    def log_domain_evaluation(self, metrics: Metrics, *, global_step: int) -> None:
        """Log `within/eval/<corpus>` over the global step: one curve per corpus over all domains."""
        self._run.log({**name_within_domain(metrics), GLOBAL_STEP: global_step})

    def log_summary(self, metrics: Metrics) -> None:
        """Set columns of the project's table of runs."""
        self._run.summary.update(dict(metrics))

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Scalar]]) -> None:
        """Log a `wandb.Table` as `tables/<name>`."""
        self._run.log({f"tables/{name}": self._wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

    def log_image(self, name: str, path: Path) -> None:
        """Log a PNG file as `images/<name>`."""
        self._run.log({f"images/{name}": self._wandb.Image(str(path))})

    def close(self, exit_code: int = 0) -> None:
        """Finish the W&B run; files not uploaded in time stay in the run folder."""
        self._run.finish(exit_code=exit_code)

    def _start(self) -> Any:
        """The started W&B run: online if possible."""
        try:
            if self._wants_online():
                return self._init("online")
        except Exception as error:
            logger.warning("W&B cannot be reached (%s); the run is kept offline, for `wandb sync`", error)
            # The service keeps the id of a run that failed to start until it is torn down.
            self._wandb.teardown()
        return self._init("offline")

    def _wants_online(self) -> bool:
        mode = self._config.wandb.mode
        if mode == "offline":
            return False
        # Without prompt=False a run started from a terminal would wait for an API key to be typed.
        has_key = bool(self._wandb.login(prompt=False, verify=False))
        if mode == "online" and not has_key:
            logger.warning("wandb.mode is online but no usable API key is configured; the run is kept offline")
        return has_key

    def _init(self, mode: Literal["online", "offline"]) -> Any:
        settings = self._config.wandb
        folder = self._job.folder.resolve()
        return self._wandb.init(
            project=settings.project,
            entity=settings.entity,
            name=self._job.name,
            group=settings.group or group_name(self._config),
            job_type=self._job.job_type,
            config=resolved_dict(self._config) if self._job.config is None else dict(self._job.config),
            dir=str(folder),
            id=_load_or_create_run_id(folder),
            resume="allow" if mode == "online" else None,
            reinit="create_new",
            mode=mode,
            # Captured console output would pass through the library on the training thread.
            settings=self._wandb.Settings(console="off", quiet=True, **self._timeouts),
        )

    def _define_axes(self) -> None:
        self._run.define_metric(GLOBAL_STEP)
        for name in map(stage_name, self._config.learned):
            self._run.define_metric(step_axis(name), hidden=True)
            self._run.define_metric(f"{name}/*", step_metric=step_axis(name))
        self._run.define_metric(DOMAINS_LEARNED, hidden=True)
        self._run.define_metric(eval_loss("*"), step_metric=DOMAINS_LEARNED)
        self._run.define_metric(within_domain("*"), step_metric=GLOBAL_STEP)


def _abandon_service(library: Any, job: WandbJob) -> str:
    """Kill the library's service process; otherwise the interpreter would wait for it forever on exit.

    Returns:
        What the user can do with what was written.
    """
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.name() == "wandb-core":
                child.kill()
    # The teardown may hang too.
    teardown = threading.Thread(target=_tear_down, args=(library,), daemon=True)
    teardown.start()
    teardown.join(TEARDOWN_TIMEOUT_S)
    return f"`wandb sync {job.folder / 'wandb' / '*run-*'}` uploads what it wrote"


def _tear_down(library: Any) -> None:
    with contextlib.suppress(Exception, SystemExit):
        library.teardown()


def _load_or_create_run_id(folder: Path) -> str:
    run_id = stored_run_id(folder)
    if run_id is None:
        run_id = secrets.token_hex(4)
        store_run_id(folder, run_id)
    return run_id
