"""Continual-learning methods: what to do when; the loops belong to `training`."""

from das_ds.methods.base import Method
from das_ds.methods.das import SoftMaskedContrast
from das_ds.methods.derpp import DarkExperienceReplay
from das_ds.methods.kd import Distillation
from das_ds.methods.ncl import Naive
from das_ds.methods.one import FromBase
from das_ds.methods.replay import NaiveReplay

METHODS: dict[str, type[Method]] = {
    "das": SoftMaskedContrast,
    "derpp": DarkExperienceReplay,
    "kd": Distillation,
    "ncl": Naive,
    "one": FromBase,
    "replay": NaiveReplay,
}
