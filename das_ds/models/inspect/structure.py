"""The surroundings of the layers of a language model: their names, the LM head, positions, unmasked parameters."""

from __future__ import annotations

import re
from typing import Literal

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, PretrainedConfig, PreTrainedModel

from das_ds.config import ObjectiveName
from das_ds.errors import ModelError
from das_ds.functional.units import UnitRule
from das_ds.models.architectures.spec import ArchitectureSpec
from das_ds.models.inspect.probe import LENGTH, probe_ids

MAX_POSITION_OFFSET = 4
"""Largest number of rows of a position embedding that are searched for as unusable by tokens."""


def guess_objective(config: PretrainedConfig) -> ObjectiveName:
    """CLM of an encoder with causal attention; else the objective of the class in `config.architectures`, else MLM if
    transformers has such a class, else CLM.

    Raises:
        ModelError: transformers has no language model of this type.
    """
    if getattr(config, "is_decoder", False) and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "clm"
    for name in getattr(config, "architectures", None) or ():
        if name.endswith("ForMaskedLM"):
            return "mlm"
        if name.endswith(("ForCausalLM", "LMHeadModel")):
            return "clm"
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        return "mlm"
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "clm"
    raise ModelError(f"transformers has no masked and no causal language model of type {config.model_type!r}")


def find_layers(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """Pattern of a layer's name, and the first layer.

    Raises:
        ModelError: the model is not one stack of layers followed by a head.
    """
    base = model.base_model_prefix
    num_layers = getattr(model.config, "num_hidden_layers", None)
    if model.base_model is model or getattr(model.config, "is_encoder_decoder", False):
        raise ModelError("it is not a language model with one stack of layers and a head")
    candidates = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and name.startswith(f"{base}.")
    ]
    # Lists inside a layer can be as long as the list of layers.
    candidates = [(name, module) for name, module in candidates if not re.search(r"\.\d+\.", f"{name}.")]
    if len(candidates) != 1:
        names = ", ".join(name for name, _ in candidates) or "none"
        raise ModelError(f"expected one list of {num_layers} layers in {base}, found {names}")
    name, module = candidates[0]
    return f"{{base}}{name.removeprefix(base)}.{{layer}}", module[0]


def find_unmasked_patterns(model: PreTrainedModel, prefix: str, rules: list[UnitRule]) -> tuple[str, ...]:
    """Parameters that no unit owns: names outside the layers, and one pattern for all layers."""
    base = model.base_model_prefix
    owned = {rule.parameter for rule in rules if not rule.consumer}
    names: list[str] = []
    for name, pattern in _match_parameters(model, prefix):
        if pattern is None:
            names.append(re.sub(f"^{base}\\.", "{base}.", name))
        elif pattern not in owned:
            names.append(pattern)
    return tuple(dict.fromkeys(names))


def find_embedding_patterns(model: PreTrainedModel, prefix: str) -> tuple[str, ...]:
    """Parameters before the first layer: of the embedding tables outside the layers, and those next to them."""
    base = model.base_model_prefix
    layers = prefix.format(base=base, layer="")
    # With all names of tied parameters, which may be listed under their names in the LM head.
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    inside = {name for name, pattern in _match_parameters(model, prefix) if pattern is not None}
    outside = [name for name in names if name not in inside]
    tables = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.startswith(f"{base}.") and f"{name}.weight" in outside
    ]
    # A module that contains the layers as well contains what follows them.
    parents = {f"{name.rpartition('.')[0]}." for name in tables}
    apart = tuple(parent for parent in parents if not layers.startswith(parent))
    found = [name for name in outside if name.removesuffix(".weight") in tables or name.startswith(apart)]
    return tuple(re.sub(f"^{base}\\.", "{base}.", name) for name in found)


def list_layer_patterns(model: PreTrainedModel, prefix: str) -> list[str]:
    """Patterns of the parameters of a layer."""
    return list(dict.fromkeys(pattern for _, pattern in _match_parameters(model, prefix) if pattern is not None))


def _match_parameters(model: PreTrainedModel, prefix: str) -> list[tuple[str, str | None]]:
    """(name, pattern) of every parameter; the pattern is None outside the layers."""
    start = re.escape(prefix.format(base=model.base_model_prefix, layer="#")).replace(r"\#", r"\d+")
    patterns = []
    for name, _ in model.named_parameters():
        match = re.fullmatch(start + r"\.(.*)", name)
        patterns.append((name, f"{prefix}.{match[1]}" if match else None))
    return patterns


def find_lm_head(model: PreTrainedModel, objective: ObjectiveName) -> tuple[tuple[str, ...], str | None]:
    """The modules that turn hidden states into logits, in call order, and the config attribute of a soft cap or None.

    The result is checked: it has to reproduce the logits of the model.

    Raises:
        ModelError: no combination reproduces the logits.
    """
    called: list[str] = []
    heads = {name: module for name, module in model.named_children() if module is not model.base_model}
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.append(name)) for name, module in heads.items()
    ]
    ids = probe_ids(model)
    try:
        with torch.no_grad():
            expected = model(ids).logits
    finally:
        for handle in handles:
            handle.remove()
    caps = [name for name in model.config.to_dict() if "softcap" in name]
    for cap in (None, *caps):
        head_only = ArchitectureSpec(
            model.config.model_type, objective, {}, (), (), (), tuple(called), logit_cap_attribute=cap
        )
        soft_cap = head_only.logit_cap(model)
        with torch.no_grad():
            logits = model.base_model(ids).last_hidden_state
            for module in head_only.head(model):
                logits = module(logits)
            logits = logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)
        if called and logits.shape == expected.shape and torch.allclose(logits, expected, rtol=1e-3, atol=1e-4):
            return tuple(called), cap
    raise ModelError(
        f"the logits differ from those of {', '.join(called) or 'no module'} behind the base model, with and without a "
        "soft cap"
    )


def find_position_offset(model: PreTrainedModel) -> int | Literal["pad_token_id"]:
    """Rows of the position embedding that no token can use, found by running ever shorter blocks until one fits.

    Models that number positions from after the padding index (RoBERTa) also set it in their position embedding.

    Raises:
        ModelError: no block runs.
    """
    padding = model.config.pad_token_id
    num_positions = getattr(model.config, "max_position_embeddings", None)
    if padding is not None and any(
        isinstance(module, nn.Embedding) and module.num_embeddings == num_positions and module.padding_idx == padding
        for name, module in model.named_modules()
        if "position" in name
    ):
        return "pad_token_id"
    if not isinstance(num_positions, int):
        return 0
    ids = probe_ids(model)[:1].repeat(1, 1 + num_positions // LENGTH)
    for offset in range(MAX_POSITION_OFFSET + 1):
        try:
            with torch.no_grad():
                model(ids[:, : num_positions - offset])
        except (IndexError, RuntimeError):
            continue
        return offset
    raise ModelError(
        f"blocks of {num_positions - MAX_POSITION_OFFSET} tokens do not run in a model with {num_positions} positions"
    )
