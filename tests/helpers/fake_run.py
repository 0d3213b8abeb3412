"""The part of a run that directions need before training, without an engine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from das_ds.distributed.state import Shard
from das_ds.models.architectures.registry import spec_for
from das_ds.models.language_model import LanguageModel
from helpers.single_rank import SingleRank
from helpers.tiny_models import tiny_model, without_dropout
from helpers.training import run_config


def make_run(folder: Path, method: dict[str, Any], model_type: str = "roberta", **changes: Any) -> Any:
    """The part of a run that directions need before training, on one rank; `changes` are keys of the model's config."""
    model = tiny_model(model_type, **without_dropout(model_type), **changes)
    spec = spec_for(model_type)
    network = LanguageModel(model, spec)
    parameters = dict(model.named_parameters())
    engine = SimpleNamespace(
        parameters=parameters,
        module=network,
        ranks=SingleRank(),
        set_masks=lambda masks: None,
        set_gradient_mask=lambda mask: None,
        set_frozen=lambda frozen: None,
        weights=SimpleNamespace(
            release_gathered=lambda: None,
            shards=[Shard(n, p, 0, 0, p.numel()) for n, p in parameters.items()],
        ),
    )
    config = run_config(folder, method=method)
    return SimpleNamespace(
        config=config,
        engine=engine,
        network=network,
        layout=spec.layout(model),
        tokens=(),
        lora=None,
        num_base_tokens=None,
    )
