"""Weights & Biases as a metric sink that can neither stop nor stall a run.

wandb's own service process isolates uploads, but a frozen service blocks every call that logs. All calls therefore run
on a background worker; training only submits them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from das_ds.config import RunConfig
from das_ds.config.io import resolved_dict
from das_ds.config.stage import stage_name
from das_ds.errors import ConfigError, RunFolderError
from das_ds.run_dir import WANDB_RUN_ID_FILE
from das_ds.storage import atomic_write
from das_ds.tracking.background import BackgroundWorker
from das_ds.tracking.names import (
    DOMAIN,
    DOMAIN_STEP,
    DOMAINS_LEARNED,
    GLOBAL_STEP,
    TOKENS_SEEN,
    eval_loss,
    within_domain,
)
from das_ds.tracking.sinks import Metrics, Scalar, Sink

MAX_PENDING_CALLS = 10_000
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


def build_wandb_sink(config: RunConfig, job: WandbJob | None = None) -> WandbSink | None:
    """The W&B sink that `config.wandb.mode` asks for; None if it is disabled.

    Mode `auto` is online if W&B finds an API key (environment, netrc, its own settings), else offline. It respects
    `WANDB_MODE=offline` and `disabled`, and goes without W&B if the package is not installed.

    Args:
        config: of the run.
        job: None: the training run itself.

    Raises:
        ConfigError: mode `online` or `offline`, and wandb is not installed.
    """
    mode = config.wandb.mode
    if mode == "disabled" or (mode == "auto" and os.environ.get("WANDB_MODE") == "disabled"):
        return None
    # Read by W&B on import; without a network its error reports delay the exit by 20 seconds.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb
    except ImportError as error:
        if mode != "auto":
            raise ConfigError(
                f"wandb.mode: found {mode}, which needs the wandb package ({error}); "
                "install das_ds[wandb], or use auto or disabled"
            ) from error
        logger.warning("W&B is off: the wandb package is not installed (wandb.mode=disabled silences this)")
        return None
    return WandbSink(config, wandb, job=job)


class WandbSink(Sink):
    """One W&B run per training run, with a step axis per domain.

    The id of the W&B run is stored in the run folder and reused on resume. All offline files of a run share that id;
    `wandb sync --append` joins them.

    Args:
        config: of the run.
        library: the `wandb` module.
        init_timeout_s: seconds to wait for the server before going offline.
        close_timeout_s: longest time that `close` blocks.
        job: None: the training run itself.
    """

    def __init__(
        self,
        config: RunConfig,
        library: Any,
        *,
        init_timeout_s: float = 30.0,
        close_timeout_s: float = 60.0,
        job: WandbJob | None = None,
    ) -> None:
        self._config = config
        self._job = job or WandbJob(
            config.output_dir, config.method.name, config.wandb.name or config.output_dir.resolve().name
        )
        self._wandb = library
        self._init_timeout_s = init_timeout_s
        self._close_timeout_s = close_timeout_s
        self._worker = BackgroundWorker("W&B", max_pending=MAX_PENDING_CALLS)
        self._worker.start(self._start)

    def log(self, metrics: Metrics, *, global_step: int) -> None:
        """Log a step as `<domain>/...`, over `<domain>/step`."""
        row = {GLOBAL_STEP: global_step, **metrics}
        # Renamed by the worker, which survives a row without a domain.
        self._worker.submit(lambda run: run.log(_name_by_domain(row)))

    def log_evaluation(self, losses: Mapping[str, float], *, domains_learned: int, global_step: int) -> None:
        """Log `eval/<corpus>` over `domains_learned`."""
        row: dict[str, Scalar] = {eval_loss(corpus): loss for corpus, loss in losses.items()}
        row |= {DOMAINS_LEARNED: domains_learned, GLOBAL_STEP: global_step}
        self._worker.submit(lambda run: run.log(row))

    def log_domain_evaluation(self, metrics: Metrics, *, global_step: int) -> None:
        """Log `within/eval/<corpus>` over the global step: one curve per corpus over all domains."""
        row = {within_domain(name): value for name, value in metrics.items() if name not in (DOMAIN, DOMAIN_STEP)}
        row[GLOBAL_STEP] = global_step
        self._worker.submit(lambda run: run.log(row))

    def log_summary(self, metrics: Metrics) -> None:
        """Set columns of the project's table of runs."""
        values = dict(metrics)
        self._worker.submit(lambda run: run.summary.update(values))

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Scalar]]) -> None:
        """Log a `wandb.Table` as `tables/<name>`."""
        # Copies, because the caller may change its lists before the worker reads them.
        names = list(columns)
        data = [list(row) for row in rows]
        self._worker.submit(lambda run: run.log({f"tables/{name}": self._wandb.Table(columns=names, data=data)}))

    def log_image(self, name: str, path: Path) -> None:
        """Log a PNG file as `images/<name>`."""
        self._worker.submit(lambda run: run.log({f"images/{name}": self._wandb.Image(str(path))}))

    def close(self, exit_code: int = 0) -> None:
        """Finish the W&B run, waiting at most `close_timeout_s`; files not uploaded yet stay in the run folder."""
        self._worker.submit(lambda run: run.finish(exit_code=exit_code))
        if not self._worker.join(self._close_timeout_s):
            logger.warning(
                "W&B did not finish within %g s and is abandoned; `wandb sync %s` uploads what it wrote",
                self._close_timeout_s,
                self._job.folder / "wandb" / "*run-*",
            )
            self._abandon()

    def _abandon(self) -> None:
        """Kill the library's service process; otherwise the interpreter would wait for it forever on exit."""
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if child.name() == "wandb-core":
                    child.kill()
        # The teardown may hang too.
        teardown = threading.Thread(target=self._worker.guard, args=("teardown", self._wandb.teardown), daemon=True)
        teardown.start()
        teardown.join(TEARDOWN_TIMEOUT_S)

    def _start(self) -> Any:
        """The started W&B run: online if possible."""
        if self._wants_online():
            try:
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
        has_key = self._worker.guard("login", lambda: self._wandb.login(prompt=False, verify=False))
        if mode == "online" and not has_key:
            logger.warning("wandb.mode is online but no usable API key is configured; the run is kept offline")
        return bool(has_key)

    def _init(self, mode: Literal["online", "offline"]) -> Any:
        config = self._config
        folder = self._job.folder.resolve()
        run = self._wandb.init(
            project=config.wandb.project,
            entity=config.wandb.entity,
            name=self._job.name,
            group=config.wandb.group or config.output_dir.resolve().parent.name,
            job_type=self._job.job_type,
            config=resolved_dict(config) if self._job.config is None else dict(self._job.config),
            dir=str(folder),
            id=_load_or_create_run_id(folder),
            resume="allow" if mode == "online" else None,
            reinit="create_new",
            mode=mode,
            settings=self._wandb.Settings(
                init_timeout=self._init_timeout_s,
                # Half of what close() grants; the other half is for pending calls.
                finish_timeout=self._close_timeout_s / 2,
                # Captured console output would pass through the library on the training thread.
                console="off",
                quiet=True,
            ),
        )
        self._define_axes(run)
        return run

    def _define_axes(self, run: Any) -> None:
        run.define_metric(GLOBAL_STEP)
        for name in map(stage_name, self._config.learned):
            run.define_metric(_step_axis(name), hidden=True)
            run.define_metric(f"{name}/*", step_metric=_step_axis(name))
        run.define_metric(DOMAINS_LEARNED, hidden=True)
        run.define_metric(eval_loss("*"), step_metric=DOMAINS_LEARNED)
        run.define_metric(within_domain("*"), step_metric=GLOBAL_STEP)


def _name_by_domain(metrics: Metrics) -> dict[str, Scalar]:
    """Metrics of a step, prefixed with its domain; counters of the complete run keep their names."""
    domain = str(metrics[DOMAIN])
    names = {GLOBAL_STEP: GLOBAL_STEP, TOKENS_SEEN: TOKENS_SEEN, DOMAIN_STEP: _step_axis(domain)}
    return {names.get(name, f"{domain}/{name}"): value for name, value in metrics.items() if name != DOMAIN}


def _step_axis(domain: str) -> str:
    return f"{domain}/step"


def stored_run_id(folder: Path) -> str | None:
    """Id of the W&B run of a run folder; None before its first use, or if the file is damaged."""
    path = folder / WANDB_RUN_ID_FILE
    if path.exists() and re.fullmatch(r"[A-Za-z0-9_-]{1,64}", run_id := path.read_text().strip()):
        return run_id
    return None


def store_run_id(folder: Path, run_id: str) -> None:
    """Log to this W&B run from now on.

    Raises:
        RunFolderError: the disk is full, or the folder cannot be written.
    """
    path = folder / WANDB_RUN_ID_FILE
    try:
        with atomic_write(path) as partial:
            partial.write_text(run_id + "\n")
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be written ({error.strerror}); expected free space") from error


def _load_or_create_run_id(folder: Path) -> str:
    run_id = stored_run_id(folder)
    if run_id is None:
        run_id = secrets.token_hex(4)
        store_run_id(folder, run_id)
    return run_id
