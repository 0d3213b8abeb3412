"""How a run is saved, watched, stopped and shown."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from das_ds.config.section import Section

SignalName = Literal["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"]


class CheckpointConfig(Section):
    """Saving what is needed to continue."""

    interval: int = Field(default=500, ge=1)
    """Optimizer steps between two checkpoints; also batches, within importance passes and evaluation."""
    keep_last: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept, besides the one at the end of every domain."""
    async_save: bool = True
    """Write while training goes on, from a copy in host memory (one checkpoint's size); false: wait for the disk."""


class ExportConfig(Section):
    """The model that is written after every domain."""

    dtype: Literal["fp32", "bf16", "base"] = "fp32"
    """Type of the exported weights, which config.json names too; `base` is that of the model the run starts from (fp32
    where its config names none)."""


class FaultsConfig(Section):
    """What to do when training goes wrong."""

    nonfinite: Literal["skip", "stop", "rewind"] = "stop"
    """On a loss or gradient norm that is not finite: `skip` leaves the step out, `stop` ends with exit code 2, `rewind`
    goes back to the newest checkpoint and leaves the step out when it comes again."""
    spike: Literal["warn", "skip", "stop", "rewind"] = "warn"
    """The same for a loss that rises suddenly; `warn` says so and takes the step."""
    spike_sigma: float = Field(default=6.0, gt=0.0)
    """Standard deviations above the mean of the last steps that make a spike."""
    spike_window: int = Field(default=128, ge=8)
    """Steps over which mean and deviation are taken; until so many are seen nothing is a spike."""
    max_rewinds: int = Field(default=3, ge=1)
    """Rewinds of one run before it stops."""


class RuntimeConfig(Section):
    """How the processes of a run live and end."""

    hang_timeout: float = Field(default=600.0, ge=1.0, le=1e8)
    """Seconds without progress after which all ranks end with a message that names the rank that is stuck; a rank that
    makes progress itself ends no run because another is silent."""
    stop_signals: list[SignalName] = Field(default=["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"])
    """Signals that make the run save a checkpoint at the next step and end with exit code 75."""


class WandbConfig(Section):
    """Weights & Biases."""

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
