"""Continual-learning methods: what to do when; the loops belong to `training`."""

from das_ds.config import MethodConfig
from das_ds.context import RunContext
from das_ds.methods.base import Method
from das_ds.methods.baselines import FromBase, Naive, NaiveReplay, Pool
from das_ds.methods.das import SoftMaskedContrast
from das_ds.methods.derpp import DarkExperienceReplay
from das_ds.methods.dga import GeneralKnowledgeContrast
from das_ds.methods.directions import DirectionMasked
from das_ds.methods.ewc import ElasticConsolidation
from das_ds.methods.kd import Distillation
from das_ds.methods.merge import Merging, NaiveMerge

METHODS: dict[str, type[Method]] = {
    "das": SoftMaskedContrast,
    "derpp": DarkExperienceReplay,
    "dga": GeneralKnowledgeContrast,
    "ewc": ElasticConsolidation,
    "kd": Distillation,
    "merge": NaiveMerge,
    "ncl": Naive,
    "one": FromBase,
    "pool": Pool,
    "replay": NaiveReplay,
}


def method_class(settings: MethodConfig) -> type[Method]:
    """What does the work of a method with these settings."""
    return DirectionMasked if settings.masks_directions else METHODS[settings.name]


def build_method(run: RunContext) -> Method:
    """The method of a run, with merging where its config asks for it.

    Raises:
        ConfigError, ModelError: the method does not fit the network.
    """
    settings = run.config.method
    method = method_class(settings)(run)
    return method if settings.merging is None else Merging(method, settings.merging)
