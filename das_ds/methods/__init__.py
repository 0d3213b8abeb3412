"""Continual-learning methods: what to do when; the loops belong to `training`."""

from das_ds.config import MethodConfig
from das_ds.context import RunContext
from das_ds.methods.base import Method
from das_ds.methods.baselines import NCL, ExperienceReplay, PerDomain, Pool
from das_ds.methods.das import DAS
from das_ds.methods.derpp import DERpp
from das_ds.methods.dga import DGA
from das_ds.methods.directions import Directions
from das_ds.methods.ewc import EWC
from das_ds.methods.kd import KD
from das_ds.methods.merge import MergingWrapper, ModelMerging

METHODS: dict[str, type[Method]] = {
    "das": DAS,
    "derpp": DERpp,
    "dga": DGA,
    "ewc": EWC,
    "kd": KD,
    "merge": ModelMerging,
    "ncl": NCL,
    "one": PerDomain,
    "pool": Pool,
    "replay": ExperienceReplay,
}


def method_class(settings: MethodConfig) -> type[Method]:
    """What does the work of a method with these settings."""
    return Directions if settings.masks_directions else METHODS[settings.name]


def build_method(run: RunContext) -> Method:
    """The method of a run, with merging where its config asks for it.

    Raises:
        ConfigError, ModelError: the method does not fit the network.
    """
    settings = run.config.method
    method = method_class(settings)(run)
    return method if settings.merging is None else MergingWrapper(method, settings.merging)
