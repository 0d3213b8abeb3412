"""Continual-learning methods: when a run measures, protects, replays or merges; the loops are in `training`.

To add one: a file with its `Method` and config class (see `base.py`), and a line in `METHODS`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from das_ds.config import MethodConfig, RunConfig
from das_ds.methods.base import Method
from das_ds.methods.baselines import NCL, ExperienceReplay, PerDomain, Pool
from das_ds.methods.das import DAS
from das_ds.methods.derpp import DERpp
from das_ds.methods.dga import DGA
from das_ds.methods.directions import Directions
from das_ds.methods.eaft import EAFT
from das_ds.methods.ewc import EWC
from das_ds.methods.freeze import Freeze
from das_ds.methods.kd import KD
from das_ds.methods.l2 import L2
from das_ds.methods.merge import MergingWrapper, ModelMerging, merging_memory
from das_ds.methods.osft import OSFT
from das_ds.methods.regmean import RegMean
from das_ds.methods.replay_distillation import (
    ReplayDistillation,
    replay_distillation_memory,
    replay_distillation_step_use,
)
from das_ds.methods.stm import STM
from das_ds.methods.teacher import check_teacher
from das_ds.models.size import MeasuredSequences, MemoryUse, ModelSize, Sharding, StepUse

if TYPE_CHECKING:
    from das_ds.config.deepspeed import EngineConfig
    from das_ds.context import RunContext

METHODS: dict[str, type[Method[Any]]] = {
    "das": DAS,
    "derpp": DERpp,
    "dga": DGA,
    "directions": Directions,
    "eaft": EAFT,
    "ewc": EWC,
    "freeze": Freeze,
    "kd": KD,
    "l2": L2,
    "merge": ModelMerging,
    "ncl": NCL,
    "one": PerDomain,
    "osft": OSFT,
    "pool": Pool,
    "regmean": RegMean,
    "replay": ExperienceReplay,
    "stm": STM,
}
DEFAULT_METHOD = "das"
FIRST_CHOICE = "directions"
"""The method of a config that `das-ds init` writes."""


def method_class(settings: MethodConfig) -> type[Method[Any]]:
    """Class of the method with these settings."""
    return METHODS[settings.name]


def validate_method(config: RunConfig, engine_config: EngineConfig) -> None:
    """Check a run's method, and what wraps it, against the other sections and the DeepSpeed config.

    Raises:
        ConfigError: settings that the method does not support.
    """
    method_class(config.method).validate(config, engine_config)
    if config.distills_replay:
        check_teacher(f"method.replay.loss {config.method.replay.loss}", engine_config)


def build_method(run: RunContext) -> Method[Any]:
    """The method of a run, with distillation of replayed text and with merging where its config asks for them.

    Raises:
        ConfigError, ModelError: the method does not fit the network.
    """
    settings = run.config.method
    method = method_class(settings)(run)
    if run.config.distills_replay:
        method = ReplayDistillation(method)
    return method if settings.merge_weight is None else MergingWrapper(method, settings.merge_weight)


def method_memory(config: RunConfig, size: ModelSize, sharding: Sharding) -> MemoryUse:
    """Memory and disk space of a run's method and of what wraps it."""
    use = method_class(config.method).memory(config, size, sharding)
    if config.distills_replay:
        use += replay_distillation_memory(size, sharding)
    return use if config.method.merge_weight is None else use + merging_memory(size, sharding)


def method_step_use(config: RunConfig, size: ModelSize, sharding: Sharding) -> StepUse:
    """Operations and exchanges of a run's method in each optimizer step; merging adds none."""
    use = method_class(config.method).step_use(config, size, sharding)
    return use + replay_distillation_step_use(config, sharding) if config.distills_replay else use


def method_measured_sequences(config: RunConfig, size: ModelSize, num_ranks: int) -> MeasuredSequences:
    """Sequences that a run's method measures on before and after domains."""
    return method_class(config.method).measured_sequences(config, size, num_ranks)
