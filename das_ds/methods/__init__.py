"""Continual-learning methods: what to do when; the loops belong to `training`."""

from das_ds.methods.base import Method
from das_ds.methods.das import SoftMaskedContrast
from das_ds.methods.derpp import DarkExperienceReplay
from das_ds.methods.dga import GeneralKnowledgeContrast
from das_ds.methods.ewc import ElasticConsolidation
from das_ds.methods.kd import Distillation
from das_ds.methods.merge import Merged
from das_ds.methods.ncl import Naive
from das_ds.methods.one import FromBase
from das_ds.methods.pool import Pool
from das_ds.methods.replay import NaiveReplay

METHODS: dict[str, type[Method]] = {
    "das": SoftMaskedContrast,
    "derpp": DarkExperienceReplay,
    "dga": GeneralKnowledgeContrast,
    "ewc": ElasticConsolidation,
    "kd": Distillation,
    "merge": Merged,
    "ncl": Naive,
    "one": FromBase,
    "pool": Pool,
    "replay": NaiveReplay,
}
