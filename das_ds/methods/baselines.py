"""Baselines: naive training, one model per domain, joint training, and experience replay."""

from __future__ import annotations

from typing import Literal

from das_ds.config import MethodConfig, RunConfig
from das_ds.config.deepspeed import EngineConfig
from das_ds.config.method import DEFAULT_REPLAY_FRACTION
from das_ds.errors import ConfigError
from das_ds.methods.base import Method


class NclConfig(MethodConfig):
    """Naive continual learning: train on one domain after another and protect nothing."""

    name: Literal["ncl"] = "ncl"


class NCL(Method[NclConfig]):
    """The baseline every other method is compared with. Keeps nothing in memory, no extra compute."""

    Config = NclConfig


class PerDomainConfig(MethodConfig):
    """One model per domain, each trained from the base: no forgetting by construction, no transfer either."""

    supports_replay = False

    name: Literal["one"] = "one"


class PerDomain(Method[PerDomainConfig]):
    """Every domain starts from the base weights. Keeps one host copy of each rank's fp32 shard, no extra compute."""

    Config = PerDomainConfig
    starts_from_base = True

    @classmethod
    def validate(cls, config: RunConfig, engine_config: EngineConfig) -> None:
        """A new LM head would be trained for the first domain only, and moments belong to one model."""
        if not config.train.reset_optimizer:
            raise ConfigError(
                f"train.reset_optimizer: found false with method {config.method.name}, whose domains all start from "
                "the stored weights; allowed there: true"
            )
        if config.model.head_warmup_steps:
            raise ConfigError(
                f"model.head_warmup_steps: found {config.model.head_warmup_steps} with method {config.method.name}, "
                "whose domains all start from the stored weights; train it in a separate run and start from the "
                "model that it exports"
            )


class PoolConfig(MethodConfig):
    """Joint training on all domains at once, the upper bound of a sequence of domains."""

    trains_jointly = True
    supports_replay = False

    name: Literal["pool"] = "pool"


class Pool(Method[PoolConfig]):
    """Joint training on all domains, the upper bound of continual learning (`Pool` in DAS, Ke et al., ICLR 2023).

    The run has one stage (`RunConfig.stages`), in whose batches all domains take turns (`data/mixture.py`); each gives
    as many samples as in a sequence of domains, also where the
    domains have different lengths. Keeps nothing in memory, no extra compute, but needs the text of all
    domains from the beginning.
    """

    Config = PoolConfig


class ReplayMethodConfig(MethodConfig):
    """Experience replay: naive training with earlier text in every batch, 1 of 16 sequences by default."""

    default_replay_fraction = DEFAULT_REPLAY_FRACTION

    name: Literal["replay"] = "replay"


class ExperienceReplay(Method[ReplayMethodConfig]):
    """Experience replay (Rolnick et al., NeurIPS 2019), from the corpora themselves instead of a buffer.

    Keeps nothing in memory, but needs the text of earlier domains to the end. No extra compute: replayed text takes the
    place of new text. `data/replay.py` does it for any method with `method.replay.fraction`; this one has a default.
    """

    Config = ReplayMethodConfig
