"""Libraries of metrics that a config can list in `tracking`: which are wanted, whether they are installed, their sinks.

Which libraries a run logs to is decided by `tracking`; `wandb.mode` says how W&B is used. Only without `tracking` does
`wandb.mode` decide too, and mode `auto` then goes without W&B if the package is not installed.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from das_ds.config import RunConfig
from das_ds.config.runtime import TrackingLibrary
from das_ds.errors import ConfigError, first_line
from das_ds.tracking.background import BackgroundSink
from das_ds.tracking.mlflow_sink import MlflowSink
from das_ds.tracking.sinks import Sink
from das_ds.tracking.tensorboard_sink import TensorBoardSink
from das_ds.tracking.trackio_sink import TrackioSink
from das_ds.tracking.wandb_sink import WandbJob, build_wandb_sink

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Library:
    """A library; its name in the config is also that of its package, and of the extra of das_ds that installs it."""

    module: str
    """What to import."""
    build: Callable[[RunConfig, Any], Sink]
    """Makes a sink from the config and the module."""


LIBRARIES: dict[TrackingLibrary, Library] = {
    "wandb": Library("wandb", build_wandb_sink),
    "tensorboard": Library(
        "torch.utils.tensorboard",
        lambda config, _: BackgroundSink("TensorBoard", partial(TensorBoardSink, config), drops_steps=True),
    ),
    "mlflow": Library("mlflow", lambda config, module: BackgroundSink("MLflow", partial(MlflowSink, config, module))),
    "trackio": Library(
        "trackio", lambda config, module: BackgroundSink("Trackio", partial(TrackioSink, config, module))
    ),
}


def import_libraries(config: RunConfig) -> dict[TrackingLibrary, Any]:
    """The modules of the libraries that a run logs to, in the order of `tracking`; importing them takes seconds.

    Without `tracking` it is W&B: None in its place if it is not installed and `wandb.mode` is `auto`.

    Raises:
        ConfigError: a library that the config asks for is not installed.
    """
    names: list[TrackingLibrary] = ["wandb"] if config.tracking is None else config.tracking
    return {name: _import(config, name) for name in names if name != "wandb" or _wants_wandb(config)}


def build_library_sinks(config: RunConfig) -> list[Sink]:
    """A sink for each library that a run logs to.

    Raises:
        ConfigError: a library that the config asks for is not installed.
    """
    modules = import_libraries(config)
    return [LIBRARIES[name].build(config, module) for name, module in modules.items() if _is_there(module)]


def build_job_sink(config: RunConfig, job: WandbJob) -> Sink | None:
    """The sink of a job other than training: W&B, or None if the run does not log to it.

    Raises:
        ConfigError: the config asks for W&B, which is not installed.
    """
    if not _wants_wandb(config):
        return None
    module = _import(config, "wandb")
    return build_wandb_sink(config, module, job) if _is_there(module) else None


def _wants_wandb(config: RunConfig) -> bool:
    mode = config.wandb.mode
    is_listed = config.tracking is None or "wandb" in config.tracking
    # W&B's own switch counts where the config leaves the mode open.
    is_off = mode == "disabled" or (mode == "auto" and os.environ.get("WANDB_MODE") == "disabled")
    return is_listed and not is_off


def _import(config: RunConfig, name: TrackingLibrary) -> Any:
    """The module; None where W&B is not installed and need not be."""
    # Read by W&B on import; without a network its error reports delay the exit by 20 seconds.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    # MLflow reports its own use over the network.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        return importlib.import_module(LIBRARIES[name].module)
    except ImportError as error:
        reason = f"which needs the {name} package ({first_line(error)}); install das_ds[{name}]"
        if config.tracking is not None:
            raise ConfigError(f"tracking: found {name}, {reason}, or leave it out") from error
        if config.wandb.mode != "auto":
            raise ConfigError(f"wandb.mode: found {config.wandb.mode}, {reason}, or use auto or disabled") from error
        return None


def _is_there(module: Any) -> bool:
    if module is None:
        logger.warning("W&B is off: the wandb package is not installed (wandb.mode=disabled silences this)")
    return module is not None
