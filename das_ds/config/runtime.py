"""Runtime: checkpoints, export, faults, hang watchdog, signals and metric tracking."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from das_ds.config.section import Section

SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
"""Of sizes of files, as transformers reads them."""

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
    max_shard_size: str = Field(default="5GB", pattern=r"^[1-9]\d*(KB|MB|GB|TB)$")
    """Largest size of each part that the weights are stored in (`model-00001-of-00007.safetensors`); ranks write parts
    side by side, and a rank holds one at a time."""

    push_to_hub: bool = False
    """Upload the model of every domain to the Hugging Face hub in the background, with the token of `hf auth login` or
    HF_TOKEN; a failed upload is tried again and never ends the run."""
    hub_model_id: str | None = Field(default=None, pattern=r"^[\w.-]+/[\w.-]+$")
    """Repository `owner/name` on the hub, which is created."""
    hub_layout: Literal["tags", "repositories"] = "tags"
    """`tags`: one repository whose main branch has the newest model, and a tag for each domain; `repositories`:
    `owner/name-domain` for each domain."""
    hub_private_repo: bool = True
    """Whether a repository that is created is private."""

    @property
    def max_shard_bytes(self) -> int:
        """`max_shard_size` in bytes."""
        return int(self.max_shard_size[:-2]) * SIZE_UNITS[self.max_shard_size[-2:]]

    @model_validator(mode="after")
    def _names_repository(self) -> ExportConfig:
        if self.push_to_hub and self.hub_model_id is None:
            raise ValueError("hub_model_id: found null with push_to_hub, expected a repository owner/name")
        return self


class MaxForgettingConfig(Section):
    """Limits on what a domain may cost other text, in nats per predicted token, checked at every evaluation within it
    (`evaluation.every_steps`)."""

    general: float | None = Field(default=None, gt=0.0)
    """Held-out loss of the general corpus above that at the start of the domain; null: no limit."""
    earlier: float | None = Field(default=None, gt=0.0)
    """Held-out loss of each earlier domain above that right after it was learned; null: no limit."""
    action: Literal["warn", "stop", "rollback"] = "warn"
    """On a higher loss: `warn` logs a warning, `stop` ends the domain's training at that step, `rollback` as well, and
    returns to the weights of the last evaluated step that kept the limits, or of the domain's start if none did."""

    @model_validator(mode="after")
    def _has_limit(self) -> MaxForgettingConfig:
        if self.general is None and self.earlier is None:
            raise ValueError("found no limit, expected general, earlier or both")
        return self


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
    max_forgetting: MaxForgettingConfig | None = None
    """Limits on forgetting within a domain; null: none."""


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
