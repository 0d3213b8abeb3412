"""Runtime: checkpoints, export, faults, hang watchdog, signals and metric tracking."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from das_ds.config.section import Section

SignalName = Literal["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"]
TrackingLibrary = Literal["wandb", "tensorboard", "mlflow", "trackio"]


class CheckpointConfig(Section):
    """Checkpoints for resuming."""

    interval: int = Field(default=500, ge=1)
    """Optimizer steps between two checkpoints; within importance passes and evaluation, batches."""
    keep_last: int = Field(default=2, ge=1)
    """Number of latest checkpoints to keep, in addition to the one at the end of each domain."""
    async_save: bool = True
    """Write in the background from a copy in host memory (the size of a checkpoint); false: wait for the disk."""


class ExportConfig(Section):
    """The model that is exported after each domain."""

    dtype: Literal["fp32", "bf16", "base"] = "fp32"
    """Type of the exported weights, also recorded in config.json; `base` is that of the base model (fp32 where its
    config names none)."""


class FaultsConfig(Section):
    """Response to failures of training."""

    nonfinite: Literal["skip", "stop", "rewind"] = "stop"
    """On a loss or gradient norm that is not finite: `skip` skips the step, `stop` exits with code 2, `rewind` rolls
    back to the latest checkpoint and skips the step when it recurs."""
    spike: Literal["warn", "skip", "stop", "rewind"] = "warn"
    """Response to a loss spike, as for `nonfinite`; `warn` logs a warning and keeps the step."""
    spike_sigma: float = Field(default=6.0, gt=0.0)
    """Standard deviations above the mean of the last steps that count as a spike."""
    spike_window: int = Field(default=128, ge=8)
    """Steps of that mean and standard deviation; no step counts as a spike before the window is full."""
    max_rewinds: int = Field(default=3, ge=1)
    """Rollbacks per run before it stops."""


class RuntimeConfig(Section):
    """Processes of a run: hang watchdog and stop signals."""

    hang_timeout: float = Field(default=600.0, ge=1.0, le=1e8)
    """Seconds without progress after which all ranks exit with a message that names the stuck rank; a rank that makes
    progress itself does not end the run because another is silent."""
    stop_signals: list[SignalName] = Field(default=["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"])
    """Signals on which the run saves a checkpoint at the next step and exits with code 75."""


class WandbConfig(Section):
    """Weights & Biases, if `tracking` lists it or is null."""

    project: str = "das_ds"
    """W&B project."""
    entity: str | None = None
    """W&B team or user; null: the account's default."""
    name: str | None = None
    """Run name; null: the name of the output folder."""
    group: str | None = None
    """W&B group; null: the name of the output folder's parent."""
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto` is online where an API key is configured, else offline."""
