"""Run config: all sections, and the checks between them."""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field, field_validator, model_validator

from das_ds.config.data import CorpusConfig, DataConfig, DomainConfig
from das_ds.config.method import AnyMethodConfig, parse_method
from das_ds.config.model import ModelConfig
from das_ds.config.runtime import (
    CheckpointConfig,
    ExportConfig,
    FaultsConfig,
    RuntimeConfig,
    TrackingLibrary,
    WandbConfig,
)
from das_ds.config.section import FolderPath, Section
from das_ds.config.stage import Stage
from das_ds.config.tasks import TaskConfig
from das_ds.config.train import EvaluationConfig, TrainConfig
from das_ds.user_files import expand_path


class RunConfig(Section):
    """A run: a model, a sequence of domains, a method."""

    output_dir: FolderPath
    """Run folder: new, empty, or that of the same run, which then resumes."""
    model: ModelConfig
    domains: list[DomainConfig] = Field(min_length=1)
    """Domains in training order."""
    general: CorpusConfig | None = None
    """General-language corpus for evaluation; only `method.replay.general` trains on it (to pre-train a base model on
    it, list it as a domain)."""
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    method: AnyMethodConfig = Field(default_factory=lambda: parse_method({}))
    evaluation: EvaluationConfig = EvaluationConfig()
    tasks: list[TaskConfig] = Field(default=[])
    """End tasks for `das-ds finetune`; training ignores them."""
    deepspeed: str | dict[str, Any] = "ds_configs/zero2.json"
    """DeepSpeed file (engine knobs only) or its content."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    export: ExportConfig = ExportConfig()
    faults: FaultsConfig = FaultsConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    tracking: list[TrackingLibrary] | None = None
    """Libraries that get the metrics beside metrics.jsonl; null: W&B as `wandb.mode` says; []: none."""
    wandb: WandbConfig = WandbConfig()
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of weights, data order, corruption and dropout."""

    @property
    def stages(self) -> list[Stage]:
        """Stages in order: the domains one by one, or all at once in the same number of steps (`trains_jointly`)."""
        names = [domain.name for domain in self.domains]
        num_steps = self.train.steps_per_domain
        if self.method.trains_jointly:
            return [Stage(0, tuple(names), len(names) * num_steps)]
        return [Stage(index, (name,), num_steps) for index, name in enumerate(names)]

    @property
    def gradient_batch_size(self) -> int:
        """Sequences, over all ranks, of each gradient that the method measures."""
        sample = self.method.sample_size
        return (sample and sample.gradient_batch_size) or self.train.global_batch_size

    @property
    def num_replayed(self) -> int:
        """Sequences of each global batch that are earlier text, in domains that have some."""
        size = self.train.global_batch_size
        if self.method.replay.fraction is not None:
            return round(self.method.replay.fraction * size)
        default = self.method.default_replay_fraction
        return 0 if default is None else max(1, round(default * size))

    def replayed(self, domain: str) -> list[str]:
        """Corpora that sequences are replayed from while a domain is learned: earlier domains, general text."""
        if not self.num_replayed:
            return []
        names = [domain.name for domain in self.domains]
        general = [self.general.name] if self.general is not None and self.method.replay.general else []
        return names[: names.index(domain)] + general

    @field_validator("deepspeed")
    @classmethod
    def _file_is_expanded(cls, value: str | dict[str, Any]) -> str | dict[str, Any]:
        return expand_path(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _names_are_unique(self) -> RunConfig:
        names = [domain.name for domain in self.domains] + ([self.general.name] if self.general else [])
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"corpus names must differ, found more than once: {', '.join(repeated)}")
        return self

    @model_validator(mode="after")
    def _tasks_are_unique(self) -> RunConfig:
        names = [task.name for task in self.tasks]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"tasks: names must differ, found more than once: {', '.join(repeated)}")
        return self

    @model_validator(mode="after")
    def _tasks_are_of_domains(self) -> RunConfig:
        domains = [domain.name for domain in self.domains]
        for number, task in enumerate(self.tasks):
            if task.domain is not None and task.domain not in domains:
                raise ValueError(f"tasks.{number}.domain: found {task.domain}, allowed: null or {', '.join(domains)}")
        return self

    @model_validator(mode="after")
    def _tokens_fit(self) -> RunConfig:
        domains = [domain.name for domain in self.domains]
        unknown = [name for name in self.data.add_tokens if name not in domains]
        if unknown:
            raise ValueError(f"data.add_tokens: found {unknown[0]}, allowed: a domain ({', '.join(domains)})")
        if self.data.add_tokens and self.model.lora is not None:
            raise ValueError(
                "data.add_tokens: found tokens with model.lora, under which embeddings are frozen and new tokens would "
                "never be learned; allowed: one of the two"
            )
        return self

    @model_validator(mode="after")
    def _tracking_is_consistent(self) -> RunConfig:
        names = self.tracking or []
        if len(set(names)) < len(names):
            raise ValueError(f"tracking: found {', '.join(names)}, allowed: each once")
        if "wandb" in names and self.wandb.mode == "disabled":
            raise ValueError(
                "tracking: found wandb with wandb.mode disabled, allowed: another wandb.mode, or tracking without wandb"
            )
        return self

    @model_validator(mode="after")
    def _replay_is_possible(self) -> RunConfig:
        replay = self.method.replay
        size = self.train.global_batch_size
        if replay.fraction is not None:
            _check_fraction(replay.fraction, size)
        elif self.num_replayed >= size:
            raise ValueError(
                f"method.name: found {self.method.name} with train.global_batch_size {size}, expected at least 2"
            )
        if self.num_replayed and not self.method.supports_replay:
            raise ValueError(
                f"method.replay.fraction: found {replay.fraction:g} with method {self.method.name}, where no domain "
                "comes after another; allowed there: 0"
            )
        if replay.general and (self.general is None or not self.general.train):
            raise ValueError("method.replay.general: found true without training text, expected general: {train: ...}")
        if replay.general and not self.num_replayed:
            raise ValueError(
                "method.replay.general: found true with nothing to replay, expected method.replay.fraction"
            )
        return self


def _check_fraction(fraction: float, global_batch_size: int) -> None:
    """Check that a fraction of a batch is an integer number of sequences, up to rounding to six digits."""
    count = fraction * global_batch_size
    if math.isclose(count, round(count), rel_tol=1e-5) and round(count) < global_batch_size:
        return
    nearest = [number for number in (math.floor(count), math.floor(count) + 1) if number < global_batch_size]
    allowed = " or ".join(f"{number / global_batch_size:.6g} ({number} of them)" for number in nearest)
    raise ValueError(
        f"method.replay.fraction: found {fraction}, {count:g} of {global_batch_size} sequences "
        f"(train.global_batch_size); nearest allowed: {allowed}"
    )
