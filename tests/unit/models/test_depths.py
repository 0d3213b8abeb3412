"""Depths of parameters, which of them a frozen part of a network has, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest

from das_ds.config import ArchitectureConfig, FrozenPart
from das_ds.errors import ConfigError
from das_ds.models.architectures.from_config import spec_from_config, spec_to_config
from das_ds.models.architectures.registry import ARCHITECTURES, spec_for
from das_ds.models.depths import frozen_parameters, known_depths
from helpers.tiny_models import tiny_model


def frozen(model: Any, embeddings: bool, num_layers: int) -> set[str]:
    return set(frozen_parameters(model, spec_for(model.config.model_type), FrozenPart(embeddings, num_layers)))


def test_frozen_parameters_of_roberta_by_name() -> None:
    model = tiny_model()
    names = [name for name, _ in model.named_parameters()]
    embeddings = {name for name in names if name.startswith("roberta.embeddings.")}
    first = {name for name in names if name.startswith("roberta.encoder.layer.0.")}
    second = {name for name in names if name.startswith("roberta.encoder.layer.1.")}
    assert frozen(model, True, 0) == embeddings
    assert frozen(model, True, 1) == embeddings | first
    assert frozen(model, False, 1) == first
    assert frozen(model, True, 2) == embeddings | first | second
    # The LM head stays, but for the projection that is tied to the embeddings.
    left = set(names) - frozen(model, True, 2)
    assert left == {f"lm_head.{name}" for name in ("bias", "dense.weight", "dense.bias")} | {
        f"lm_head.layer_norm.{name}" for name in ("weight", "bias")
    }
    assert frozen_parameters(model, spec_for("roberta"), None) == frozenset()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_frozen_parameters_leave_something_to_train(model_type: str) -> None:
    model = tiny_model(model_type)
    names = [name for name, _ in model.named_parameters()]
    everything = frozen(model, True, 2)
    assert frozen(model, True, 0) and set(names) - everything
    tables = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    assert tables <= {id(parameter) for name, parameter in model.named_parameters() if name in frozen(model, True, 0)}
    layers = {name for name in names if re.search(r"\.(0|1)\.", name)}
    assert everything - frozen(model, True, 0) == frozen(model, False, 2) == layers


def test_frozen_parameters_more_layers_than_there_are_raises() -> None:
    with pytest.raises(ConfigError, match=r"method.num_layers: found 3, allowed: at most 2, the layers of the network"):
        frozen(tiny_model(), True, 3)


def test_frozen_parameters_unknown_embeddings_raises() -> None:
    model = tiny_model("llama")
    values = spec_to_config(spec_for("llama"))
    assert values.pop("embeddings") == ["{base}.embed_tokens.weight"]
    spec = spec_from_config(ArchitectureConfig.model_validate(values), "llama")
    with pytest.raises(ConfigError, match=r"model.architecture.embeddings names no parameter of the network; list its"):
        frozen_parameters(model, spec, FrozenPart(True, 1))
    assert frozen_parameters(model, spec, FrozenPart(False, 1)) == frozenset(frozen(model, False, 1))
    with pytest.raises(ConfigError, match=r"train.layer_lr_decay: found 0.9, but model.architecture.embeddings names"):
        known_depths(model, spec, "train.layer_lr_decay: found 0.9")
