"""What a method works with during a whole run: the engine over a network, its units and its gates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from das_ds.config import RunConfig
from das_ds.deepspeed_config import without_leaf_modules
from das_ds.distributed.engine import Engine
from das_ds.distributed.launch import Ranks
from das_ds.functional.units import UnitLayout
from das_ds.models.adapter import ArchitectureAdapter, Objective
from das_ds.models.dropout import has_dropout
from das_ds.models.gates import UnitGates
from das_ds.models.language_model import LanguageModel


@dataclass(frozen=True)
class RunContext:
    """What a method may use during the whole run."""

    config: RunConfig
    engine: Engine
    layout: UnitLayout
    gates: UnitGates
    objective: Objective
    """Pre-training loss, and its name in metrics."""
    view_dropout: float
    """Dropout at the units where views are made; 0 for networks that have dropout of their own."""


def build_context(
    config: RunConfig,
    model: PreTrainedModel,
    adapter: ArchitectureAdapter,
    deepspeed_config: dict[str, Any],
    ranks: Ranks,
) -> RunContext:
    """Put a network under an engine.

    Raises:
        ModelError: an adapter that does not fit the network.
    """
    layout, gates = adapter.layout(model), UnitGates(model, adapter)
    engine = Engine(
        LanguageModel(model, adapter),
        dict(model.named_parameters()),
        config.train,
        without_leaf_modules(deepspeed_config) if adapter.has_experts else deepspeed_config,
        ranks,
    )
    view_dropout = 0.0 if has_dropout(model.config, adapter.dropouts) else config.method.view_dropout
    return RunContext(config, engine, layout, gates, adapter.objective, view_dropout)
