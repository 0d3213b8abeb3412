"""Weights & Biases as a sink that can neither stop nor stall a run.

Every call of the library runs on one daemon thread behind a bounded queue. Training only puts jobs into the queue;
a job that fails is dropped with one warning, and a library that hangs fills the queue, whose overflow is dropped.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import re
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from das_ds.config import RunConfig
from das_ds.errors import ConfigError, RunFolderError
from das_ds.run_dir import WANDB_RUN_ID_FILE
from das_ds.storage import atomic_write
from das_ds.tracking.names import DOMAIN, DOMAIN_STEP, DOMAINS_LEARNED, GLOBAL_STEP, TOKENS_SEEN, eval_loss
from das_ds.tracking.sinks import Metrics, Scalar, Sink

MAX_WAITING_JOBS = 10_000
TEARDOWN_TIMEOUT_S = 5.0

logger = logging.getLogger(__name__)

Job = Callable[[Any], object]


@dataclass(frozen=True)
class WandbJob:
    """A W&B run besides that of the training run, in its group."""

    folder: Path
    """Holds its id and files."""
    job_type: str
    name: str
    config: Mapping[str, Any] | None = None
    """What W&B shows as its settings; None: those of the run config."""


def build_wandb_sink(config: RunConfig, job: WandbJob | None = None) -> WandbSink | None:
    """The W&B sink that `config.wandb.mode` asks for, or none.

    Args:
        config: of the run.
        job: None: the training run itself.

    `auto` is online where W&B finds an API key (environment, netrc, its own settings), else offline; it obeys
    `WANDB_MODE=offline` and `disabled`, and does without W&B where the package is missing.

    Raises:
        ConfigError: `online` or `offline` is demanded and wandb is not installed.
    """
    mode = config.wandb.mode
    if mode == "disabled" or (mode == "auto" and os.environ.get("WANDB_MODE") == "disabled"):
        return None
    # W&B reads this when imported; on nodes without a network its error reports hold up the exit for 20 seconds.
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

    The run's id lies in the run folder and is used again on resume. Offline parts of one run share that id;
    `wandb sync --append` joins them.

    Args:
        library: the `wandb` module.
        init_timeout_s: seconds after which going online is given up for offline.
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
        self._warned = False
        self._jobs: queue.Queue[Job | None] = queue.Queue(MAX_WAITING_JOBS)
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, metrics: Metrics, *, global_step: int) -> None:
        """Log a step under the names `<domain>/...`, over `<domain>/step`."""
        row = {GLOBAL_STEP: global_step, **metrics}
        self._put(lambda run: run.log(_by_domain(row)))

    def log_evaluation(self, losses: Mapping[str, float], *, domains_learned: int, global_step: int) -> None:
        """Log `eval/<corpus>` over `domains_learned`."""
        row: dict[str, Scalar] = {eval_loss(corpus): loss for corpus, loss in losses.items()}
        row |= {DOMAINS_LEARNED: domains_learned, GLOBAL_STEP: global_step}
        self._put(lambda run: run.log(row))

    def log_summary(self, metrics: Metrics) -> None:
        """Set columns of the project's run table."""
        values = dict(metrics)
        self._put(lambda run: run.summary.update(values))

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Scalar]]) -> None:
        """Log a `wandb.Table` as `tables/<name>`."""
        names, data = list(columns), [list(row) for row in rows]
        self._put(lambda run: run.log({f"tables/{name}": self._wandb.Table(columns=names, data=data)}))

    def log_image(self, name: str, path: Path) -> None:
        """Log a PNG file as `pictures/<name>`."""
        self._put(lambda run: run.log({f"pictures/{name}": self._wandb.Image(str(path))}))

    def close(self, exit_code: int = 0) -> None:
        """Finish the run, waiting at most `close_timeout_s`; what was not uploaded stays in the run folder."""
        self._put(lambda run: run.finish(exit_code=exit_code))
        self._put(None)
        self._thread.join(self._close_timeout_s)
        if self._thread.is_alive():
            logger.warning(
                "W&B did not finish within %g s and is left behind; `wandb sync %s` uploads what it wrote",
                self._close_timeout_s,
                self._job.folder / "wandb" / "*run-*",
            )
            self._abandon()

    def _abandon(self) -> None:
        """End the library's service process, for which it would wait without bound when the interpreter exits."""
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if child.name() == "wandb-core":
                    child.kill()
        teardown = threading.Thread(target=self._guarded, args=("teardown", self._wandb.teardown), daemon=True)
        teardown.start()
        teardown.join(TEARDOWN_TIMEOUT_S)

    def _put(self, job: Job | None) -> None:
        try:
            self._jobs.put_nowait(job)
        except queue.Full as error:
            self._warn_once("queue", error)

    def _work(self) -> None:
        run = self._guarded("init", self._start)
        for job in iter(self._jobs.get, None):
            if run is not None:
                self._guarded("call", job, run)

    def _guarded(self, what: str, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except (Exception, SystemExit) as error:
            # SystemExit would end the thread, and with it all that is still to be logged.
            self._warn_once(what, error)
            return None

    def _warn_once(self, what: str, error: BaseException) -> None:
        if not self._warned:
            self._warned = True
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            # A full queue is the one failure that is no surprise.
            trace = None if isinstance(error, queue.Full) else error
            logger.warning(
                "W&B %s failed (%s); training goes on, further failures are not shown", what, reason, exc_info=trace
            )

    def _start(self) -> Any:
        if self._wants_online():
            try:
                return self._init("online")
            except Exception as error:
                logger.warning("W&B cannot be reached (%s); the run is kept offline, for `wandb sync`", error)
                # The library's service holds the id of a run that failed to start until it is torn down.
                self._wandb.teardown()
        return self._init("offline")

    def _wants_online(self) -> bool:
        mode = self._config.wandb.mode
        if mode == "offline":
            return False
        # Without prompt=False a run started from a terminal would wait for somebody to type an API key.
        has_key = self._guarded("login", lambda: self._wandb.login(prompt=False, verify=False))
        if mode == "online" and not has_key:
            logger.warning("wandb.mode is online but no usable API key is configured; the run is kept offline")
        return bool(has_key)

    def _init(self, mode: Literal["online", "offline"]) -> Any:
        config, folder = self._config, self._job.folder.resolve()
        run = self._wandb.init(
            project=config.wandb.project,
            entity=config.wandb.entity,
            name=self._job.name,
            group=config.wandb.group or config.output_dir.resolve().parent.name,
            job_type=self._job.job_type,
            config=config.model_dump(mode="json") if self._job.config is None else dict(self._job.config),
            dir=str(folder),
            id=_run_id(folder),
            resume="allow" if mode == "online" else None,
            reinit="create_new",
            mode=mode,
            settings=self._library_settings(),
        )
        self._define_axes(run)
        return run

    def _library_settings(self) -> Any:
        return self._wandb.Settings(
            init_timeout=self._init_timeout_s,
            # Half of what close() grants: the other half is for jobs that still wait in the queue.
            finish_timeout=self._close_timeout_s / 2,
            # Captured output would pass through the library on the training thread.
            console="off",
            quiet=True,
        )

    def _define_axes(self, run: Any) -> None:
        run.define_metric(GLOBAL_STEP)
        for stage in self._config.stages:
            run.define_metric(_step_axis(stage.name), hidden=True)
            run.define_metric(f"{stage.name}/*", step_metric=_step_axis(stage.name))
        run.define_metric(DOMAINS_LEARNED, hidden=True)
        run.define_metric(eval_loss("*"), step_metric=DOMAINS_LEARNED)


def _by_domain(metrics: Metrics) -> dict[str, Scalar]:
    """Metrics of a step under the names of its domain; what counts over the whole run keeps its name."""
    domain = str(metrics[DOMAIN])
    names = {GLOBAL_STEP: GLOBAL_STEP, TOKENS_SEEN: TOKENS_SEEN, DOMAIN_STEP: _step_axis(domain)}
    return {names.get(name, f"{domain}/{name}"): value for name, value in metrics.items() if name != DOMAIN}


def _step_axis(domain: str) -> str:
    return f"{domain}/step"


def stored_run_id(folder: Path) -> str | None:
    """The id of the W&B run that this run folder reports to; None before its first use."""
    path = folder / WANDB_RUN_ID_FILE
    if path.exists() and re.fullmatch(r"[A-Za-z0-9_-]{1,64}", stored := path.read_text().strip()):
        return stored
    return None


def store_run_id(folder: Path, run_id: str) -> None:
    """Report to this W&B run from now on.

    Raises:
        RunFolderError: the disk is full, or the folder cannot be written.
    """
    path = folder / WANDB_RUN_ID_FILE
    try:
        with atomic_write(path) as partial:
            partial.write_text(run_id + "\n")
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be written ({error.strerror}); expected free space") from error


def _run_id(folder: Path) -> str:
    """The id stored in the run folder, made and stored on first use."""
    run_id = stored_run_id(folder)
    if run_id is None:
        run_id = secrets.token_hex(4)
        store_run_id(folder, run_id)
    return run_id
