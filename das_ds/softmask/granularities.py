"""Granularities of importance: one module and one line here for each of them.

The values are looked up when they are needed: a run config is checked against the names without loading the engine.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from das_ds.config import SoftmaskConfig
    from das_ds.softmask.importance import Importance

GRANULARITIES = {
    "unit": "das_ds.softmask.unit:UnitImportance",
    "parameter": "das_ds.softmask.parameter:ParameterImportance",
}
"""`importance.granularity` -> module and class of its importance."""


def load_granularity(name: str) -> type[Importance[SoftmaskConfig]]:
    """The class of a granularity.

    Raises:
        KeyError: there is no such granularity.
    """
    module, class_name = GRANULARITIES[name].split(":")
    loaded: type[Importance[SoftmaskConfig]] = getattr(importlib.import_module(module), class_name)
    return loaded
