"""Run config: all sections, and the checks between them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from das_ds.config.benchmarks import BenchmarksConfig
from das_ds.config.continuation import CONTINUE, ContinueConfig
from das_ds.config.data import CorpusConfig, DataConfig, EvaluationCorpusConfig
from das_ds.config.domain import DomainConfig
from das_ds.config.generation import check_generation
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
from das_ds.config.stage import Stage, stage_name
from das_ds.config.tasks import TaskConfig
from das_ds.config.train import EvaluationConfig, TrainConfig
from das_ds.errors import ConfigError
from das_ds.user_files import expand_path


class RunConfig(Section):
    """A run: a model, a sequence of domains, a method."""

    output_dir: FolderPath
    """Run folder: new, empty, or that of the same run, which then resumes."""
    continue_from: ContinueConfig | None = None
    """Earlier run that this one continues with further domains: its model, text and all that its method knows are kept;
    null: none."""
    model: ModelConfig
    domains: list[DomainConfig] = Field(min_length=1)
    """Domains in training order; with `continue_from` those of the earlier run come first and need not be given."""
    general: CorpusConfig | None = None
    """General-language corpus for evaluation; its training text is protected by method `directions` and replayed by
    `method.replay.general` (to pre-train a base model on it, list it as a domain)."""
    evaluate_on: list[EvaluationCorpusConfig] = Field(default=[])
    """More corpora for evaluation alone; each is a column of the loss matrix."""
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    method: AnyMethodConfig = Field(default_factory=lambda: parse_method({}))
    evaluation: EvaluationConfig = EvaluationConfig()
    tasks: list[TaskConfig] = Field(default=[])
    """End tasks for `das-ds finetune`; training ignores them."""
    benchmarks: BenchmarksConfig = BenchmarksConfig()
    deepspeed: str | dict[str, Any] = "zero2"
    """Engine knobs of DeepSpeed: zero0, zero1, zero2, zero3, zero2_offload, zero3_offload, the path of a DeepSpeed
    file, or its content."""
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
    def num_earlier(self) -> int:
        """Domains at the beginning of `domains` that were learned by the run that this one continues; 0: none."""
        if self.continue_from is None:
            return 0
        return [domain.name for domain in self.domains].index(str(self.continue_from.after)) + 1

    @property
    def readable_domains(self) -> list[DomainConfig]:
        """Domains whose text is read: all, or without those of an earlier run (`continue_from.evaluate`)."""
        if self.continue_from is None or self.continue_from.evaluate:
            return self.domains
        return self.domains[self.num_earlier :]

    @property
    def learned(self) -> list[tuple[str, ...]]:
        """Domains of each stage in order: one by one, or all at once (`trains_jointly`)."""
        names = [domain.name for domain in self.domains]
        return [tuple(names)] if self.method.trains_jointly else [(name,) for name in names]

    @property
    def own_stages(self) -> list[Stage]:
        """Stages that this run learns itself: all but those of the run that it continues."""
        return self.stages[self.num_earlier :]

    @property
    def stage_names(self) -> list[str]:
        """Name of each stage in order, also where `stages` are not known before the text is read."""
        return [stage_name(names) for names in self.learned]

    @property
    def stages(self) -> list[Stage]:
        """Stages in order; joint training takes as many steps, and samples of each domain, as all of them one by one.

        A domain that an earlier run learned for a number of epochs has 0 steps until its text is read.

        Raises:
            ConfigError: the length of a domain is in epochs, see `with_steps`.
        """
        steps = {domain.name: self._num_steps(number) for number, domain in enumerate(self.domains)}
        stages = []
        for index, names in enumerate(self.learned):
            weights = tuple(steps[name] for name in names)
            equal = len(set(weights)) == 1
            stages.append(Stage(index, names, sum(weights), () if equal else weights))
        return stages

    def with_steps(self, num_blocks: Mapping[str, int]) -> RunConfig:
        """The config with steps in place of epochs.

        Args:
            num_blocks: domain -> its training blocks, of the domains whose text is read.
        """
        domains = []
        for domain in self.domains:
            if domain.epochs is not None and domain.name in num_blocks:
                # As a decimal: 0.1 x 30 samples are 3, and not a little more.
                samples = Fraction(str(domain.epochs)) * num_blocks[domain.name]
                steps = math.ceil(samples / self.own_samples_per_step(domain.name))
                domain = domain.model_copy(update={"steps": steps, "epochs": None})
            domains.append(domain)
        return self.model_copy(update={"domains": domains})

    def train_settings(self, domain: str) -> TrainConfig:
        """The section `train` as it is for one domain."""
        return self.train.model_copy(update=self.domain(domain).schedule)

    def domain(self, name: str) -> DomainConfig:
        """The domain of this name."""
        return next(domain for domain in self.domains if domain.name == name)

    @property
    def gradient_batch_size(self) -> int:
        """Sequences, over all ranks, of each gradient that the method measures."""
        sample = self.method.sample_size
        return (sample and sample.gradient_batch_size) or self.train.global_batch_size

    def num_replayed(self, domain: str) -> int:
        """Sequences of each global batch that are replayed while a domain is learned, if there is text for it."""
        size = self.train.global_batch_size
        fraction = self.domain(domain).replay.fraction
        if fraction is None:
            fraction = self.method.replay.fraction
        if fraction is not None:
            return round(fraction * size)
        default = self.method.default_replay_fraction
        return 0 if default is None else max(1, round(default * size))

    def replayed(self, domain: str) -> list[str]:
        """Corpora that sequences are replayed from while a domain is learned: earlier domains, general text."""
        return self._earlier_text(domain) if self.num_replayed(domain) else []

    def replays_generated(self, domain: str) -> bool:
        """Whether the model writes text before a domain that is replayed while the domain is learned."""
        return self.method.replay.source != "earlier" and self.num_replayed(domain) > 0

    def replays(self, domain: str) -> bool:
        """Whether anything is replayed while a domain is learned."""
        return bool(self.replayed(domain)) or self.replays_generated(domain)

    def own_samples_per_step(self, domain: str) -> int:
        """Sequences of each global batch that are not replayed while a domain is learned."""
        return self.train.global_batch_size - (self.num_replayed(domain) if self.replays(domain) else 0)

    def _earlier_text(self, domain: str) -> list[str]:
        names = [domain.name for domain in self.readable_domains]
        general = [self.general.name] if self.general is not None and self.method.replay.general else []
        # An earlier domain that is not read has no text before it either.
        before = names[: names.index(domain) if domain in names else 0]
        return general if self.method.replay.source == "generated" else before + general

    @property
    def distills_replay(self) -> bool:
        """Whether replayed text teaches what an earlier model predicts there, in domains that replay some."""
        replays = not self.method.trains_jointly and any(self.replays(domain.name) for domain in self.domains)
        return self.method.replay.loss == "kl" and replays

    @property
    def _own_domains(self) -> list[tuple[int, DomainConfig]]:
        """Domains that this run learns, by their position; settings of earlier ones are those of another run."""
        return list(enumerate(self.domains))[self.num_earlier :]

    def _num_steps(self, number: int) -> int:
        domain = self.domains[number]
        if domain.epochs is not None and number < self.num_earlier:
            # What follows from the text of an earlier run is of no use to this one.
            return 0
        if domain.epochs is not None:
            raise ConfigError(
                f"domains.{number}.epochs: found {domain.epochs:g}, which are steps only once the text is read; "
                f"expected steps or tokens here (domains.{number}.epochs=null domains.{number}.tokens=...)"
            )
        if domain.tokens is not None:
            return -(-domain.tokens // (self.train.global_batch_size * self.data.sequence_length))
        return domain.steps or self.train.steps_per_domain

    @field_validator("deepspeed")
    @classmethod
    def _file_is_expanded(cls, value: str | dict[str, Any]) -> str | dict[str, Any]:
        return expand_path(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _names_are_unique(self) -> RunConfig:
        corpora = [*self.domains, *([self.general] if self.general else []), *self.evaluate_on]
        names = [corpus.name for corpus in corpora]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"corpus names must differ, found more than once: {', '.join(repeated)}")
        return self

    @model_validator(mode="after")
    def _has_further_domain(self) -> RunConfig:
        if self.continue_from is None:
            return self
        after = self.continue_from.after
        names = [domain.name for domain in self.domains]
        if after not in names:
            raise ValueError(
                f"{CONTINUE}.after: found {after}, expected a domain of the earlier run, which `domains` has to begin "
                f"with, found {', '.join(names)}"
            )
        if self.output_dir.resolve() == self.continue_from.run.resolve():
            raise ValueError(
                f"output_dir: found {self.output_dir}, the run that is continued, which is only read; expected another "
                "folder"
            )
        if after == names[-1]:
            raise ValueError(f"domains: found none after {after}, expected the domains to continue {CONTINUE} with")
        if self.method.trains_jointly:
            raise ValueError(
                f"{CONTINUE}: found a run with method {self.method.name}, which learns all domains at once; allowed "
                "there: null"
            )
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
    def _domain_settings_fit(self) -> RunConfig:
        for number, domain in self._own_domains:
            key = f"domains.{number}"
            if domain.lr_scheduler is not None and self.train.lr_scheduler == "infinite":
                raise ValueError(
                    f"{key}.lr_scheduler: found {domain.lr_scheduler} with train.lr_scheduler infinite, one schedule "
                    "for all domains; allowed there: null"
                )
            if domain.schedule and self.method.trains_jointly:
                name = next(iter(domain.schedule))
                raise ValueError(
                    f"{key}.{name}: found {domain.schedule[name]} with method {self.method.name}, where all domains "
                    "share one schedule; allowed there: null, and steps, epochs or tokens"
                )
            try:
                TrainConfig.model_validate({**self.train.model_dump(), **domain.schedule})
            except ValidationError as error:
                raise ValueError(f"{key}: {error.errors()[0]['ctx']['error']}") from None
        return self

    @model_validator(mode="after")
    def _shuffle_buffer_has_a_batch(self) -> RunConfig:
        # A step that needs many windows at once would make them again and again.
        size = self.train.global_batch_size
        corpora = [*self.domains, *([self.general] if self.general else [])]
        if self.data.shuffle_buffer < size and any(corpus.is_streamed for corpus in corpora):
            raise ValueError(
                f"data.shuffle_buffer: found {self.data.shuffle_buffer} with streaming, expected at least {size} "
                "blocks, one global batch (train.global_batch_size)"
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
            _check_fraction("method.replay.fraction", replay.fraction, size)
        elif any(self.num_replayed(domain.name) >= size for _, domain in self._own_domains):
            raise ValueError(
                f"method.name: found {self.method.name} with train.global_batch_size {size}, expected at least 2"
            )
        for number, domain in self._own_domains:
            if domain.replay.fraction is not None:
                self._check_own_replay(f"domains.{number}.replay.fraction", domain.name, domain.replay.fraction)
        if replay.fraction and not self.method.supports_replay:
            raise ValueError(
                f"method.replay.fraction: found {replay.fraction:g} with method {self.method.name}, where no domain "
                "comes after another; allowed there: 0"
            )
        if replay.general and (self.general is None or not self.general.train):
            raise ValueError("method.replay.general: found true without training text, expected general: {train: ...}")
        replays = any(self.num_replayed(domain.name) for _, domain in self._own_domains)
        if self.continue_from is not None and not self.continue_from.evaluate:
            _, first = self._own_domains[0]
            if self.num_replayed(first.name) and not self.replays(first.name):
                raise ValueError(
                    f"{CONTINUE}.evaluate: found false where {first.name} replays earlier text, which then is "
                    "not read; allowed there: true, or method.replay.fraction 0"
                )
        check_generation(self, replays=replays)
        if replay.general and not replays:
            raise ValueError(
                "method.replay.general: found true with nothing to replay, expected method.replay.fraction"
            )
        if replay.loss == "kl" and not replays:
            raise ValueError("method.replay.loss: found kl with nothing to replay, expected method.replay.fraction")
        if replay.loss == "kl" and self.method.has_teacher:
            raise ValueError(
                f"method.replay.loss: found kl with method {self.method.name}, which asks the same teacher about all "
                "text; allowed there: ce"
            )
        return self

    def _check_own_replay(self, key: str, domain: str, fraction: float) -> None:
        _check_fraction(key, fraction, self.train.global_batch_size)
        if fraction and not self.method.supports_replay:
            raise ValueError(
                f"{key}: found {fraction:g} with method {self.method.name}, where no domain comes after another; "
                "allowed there: 0"
            )
        if fraction and not self._earlier_text(domain) and self.method.replay.source == "earlier":
            raise ValueError(
                f"{key}: found {fraction:g} where there is no earlier text, allowed there: 0, or other text with "
                "method.replay.general or method.replay.source generated"
            )

    @model_validator(mode="after")
    def _forgetting_is_measured(self) -> RunConfig:
        limits = self.faults.max_forgetting
        if limits is None:
            return self
        if self.evaluation.every_steps is None:
            raise ValueError("faults.max_forgetting: needs evaluations within domains, expected evaluation.every_steps")
        if limits.general is not None and self.general is None:
            raise ValueError(
                f"faults.max_forgetting.general: found {limits.general:g} without a corpus, expected general"
            )
        if limits.earlier is not None and not self.method.supports_replay:
            raise ValueError(
                f"faults.max_forgetting.earlier: found {limits.earlier:g} with method {self.method.name}, where no "
                "domain comes after another; allowed there: null"
            )
        return self


def _check_fraction(key: str, fraction: float, global_batch_size: int) -> None:
    """Check that a fraction of a batch is an integer number of sequences, up to rounding to six digits."""
    count = fraction * global_batch_size
    if math.isclose(count, round(count), rel_tol=1e-5) and round(count) < global_batch_size:
        return
    nearest = [number for number in (math.floor(count), math.floor(count) + 1) if number < global_batch_size]
    allowed = " or ".join(f"{number / global_batch_size:.6g} ({number} of them)" for number in nearest)
    raise ValueError(
        f"{key}: found {fraction}, {count:g} of {global_batch_size} sequences (train.global_batch_size); nearest "
        f"allowed: {allowed}"
    )
