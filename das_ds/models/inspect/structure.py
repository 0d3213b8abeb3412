"""What stands around the layers of a language model: where they are, the LM head, positions, parameters of no unit."""

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

MOST_OFFSET = 4
"""Positions beside those of tokens that a position embedding may have."""


def guess_objective(config: PretrainedConfig) -> ObjectiveName:
    """What a network of this type is pre-trained with.

    Raises:
        ModelError: transformers has no language model of it.
    """
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
    """Pattern of a layer's name, and the first layer."""
    base = model.base_model_prefix
    num_layers = getattr(model.config, "num_hidden_layers", None)
    if model.base_model is model or getattr(model.config, "is_encoder_decoder", False):
        raise ModelError("it is no language model with one stack of layers behind a head")
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and name.startswith(f"{base}.")
    ]
    # Lists inside a layer can be as long as the list of layers.
    found = [(name, module) for name, module in found if not re.search(r"\.\d+\.", f"{name}.")]
    if len(found) != 1:
        names = ", ".join(name for name, _ in found) or "none"
        raise ModelError(f"expected one list of {num_layers} layers in {base}, found {names}")
    name, module = found[0]
    return f"{{base}}{name.removeprefix(base)}.{{layer}}", module[0]


def unmasked_patterns(model: PreTrainedModel, prefix: str, rules: list[UnitRule]) -> tuple[str, ...]:
    """What no unit owns: names outside of the layers, and one pattern for all layers."""
    base = model.base_model_prefix
    owned = {rule.parameter for rule in rules if not rule.consumer}
    names: list[str] = []
    for name, pattern in _patterns(model, prefix):
        if pattern is None:
            names.append(re.sub(f"^{base}\\.", "{base}.", name))
        elif pattern not in owned:
            names.append(pattern)
    return tuple(dict.fromkeys(names))


def layer_patterns(model: PreTrainedModel, prefix: str) -> list[str]:
    """Patterns of the parameters of a layer."""
    return list(dict.fromkeys(pattern for _, pattern in _patterns(model, prefix) if pattern is not None))


def _patterns(model: PreTrainedModel, prefix: str) -> list[tuple[str, str | None]]:
    """Every parameter with its pattern, None outside of the layers."""
    start = re.escape(prefix.format(base=model.base_model_prefix, layer="#")).replace(r"\#", r"\d+")
    found = []
    for name, _ in model.named_parameters():
        match = re.fullmatch(start + r"\.(.*)", name)
        found.append((name, f"{prefix}.{match[1]}" if match else None))
    return found


def find_lm_head(model: PreTrainedModel, objective: ObjectiveName) -> tuple[tuple[str, ...], str | None]:
    """Modules behind the base model in the order of their calls, and the attribute of a cap, proved on the logits."""
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
        bare = ArchitectureSpec(
            model.config.model_type, objective, {}, (), (), (), tuple(called), logit_cap_attribute=cap
        )
        limit = bare.logit_cap(model)
        with torch.no_grad():
            logits = model.base_model(ids).last_hidden_state
            for part in bare.head(model):
                logits = part(logits)
            logits = logits if limit is None else limit * torch.tanh(logits / limit)
        if called and logits.shape == expected.shape and torch.allclose(logits, expected, rtol=1e-3, atol=1e-4):
            return tuple(called), cap
    raise ModelError(
        f"the logits are not those of {', '.join(called) or 'no module'} behind the base model, alone or with a cap"
    )


def find_position_offset(model: PreTrainedModel) -> int | Literal["pad_token_id"]:
    """Positions that the longest block cannot use, found by running blocks until one fits.

    Models that number positions behind the padding index give that index to their position embedding too.
    """
    padding, num_positions = model.config.pad_token_id, getattr(model.config, "max_position_embeddings", None)
    if padding is not None and any(
        isinstance(module, nn.Embedding) and module.num_embeddings == num_positions and module.padding_idx == padding
        for name, module in model.named_modules()
        if "position" in name
    ):
        return "pad_token_id"
    longest = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(longest, int):
        return 0
    ids = probe_ids(model)[:1].repeat(1, 1 + longest // LENGTH)
    for offset in range(MOST_OFFSET + 1):
        try:
            with torch.no_grad():
                model(ids[:, : longest - offset])
        except (IndexError, RuntimeError):
            continue
        return offset
    raise ModelError(f"blocks of {longest - MOST_OFFSET} tokens do not run, in a model with {longest} positions")
