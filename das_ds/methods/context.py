"""What a method works with during a whole run: the engine over a network, its units and its gates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from das_ds.config import ObjectiveName, RunConfig
from das_ds.distributed.engine import Engine
from das_ds.distributed.launch import Ranks
from das_ds.functional.units import UnitLayout
from das_ds.models.adapter import ArchitectureAdapter
from das_ds.models.dropout import has_dropout
from das_ds.models.gates import UnitGates
from das_ds.models.isolation import check_isolation
from das_ds.models.language_model import LanguageModel


@dataclass(frozen=True)
class RunContext:
    """What a method may use during the whole run."""

    config: RunConfig
    engine: Engine
    layout: UnitLayout
    gates: UnitGates
    objective: ObjectiveName
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
        ConfigError: documents are to be isolated, and the network does not.
    """
    layout, gates = adapter.layout(model), UnitGates(model, adapter)
    engine = Engine(
        LanguageModel(model, adapter, logits_mib=config.train.logits_mib),
        dict(model.named_parameters()),
        config.train,
        deepspeed_config,
        ranks,
    )
    if config.data.isolate_documents:
        _check_isolation(engine, model, adapter, ranks)
    view_dropout = 0.0 if has_dropout(model.config) else config.method.view_dropout
    return RunContext(config, engine, layout, gates, adapter.objective, view_dropout)


def _check_isolation(engine: Engine, model: PreTrainedModel, adapter: ArchitectureAdapter, ranks: Ranks) -> None:
    nothing = torch.zeros(0, dtype=torch.int64, device=ranks.info.device)
    engine.module.eval()
    check_isolation(
        lambda input_ids, position_ids: engine.module(input_ids, nothing, nothing, position_ids)[0],
        model_type=adapter.model_type,
        attention=model.config._attn_implementation,
        device=ranks.info.device,
    )
    engine.module.train()
    engine.release_gathered_weights()
