"""A table of units in a run config."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, model_validator

from das_ds.config.section import Section

ObjectiveName = Literal["mlm", "clm"]
"""Masked or causal language modeling."""
GroupName = Literal["head", "intermediate", "output"]
"""Attention heads, neurons of the MLP, outputs of its second map."""


class UnitCountsConfig(Section):
    """Units per layer of each group; a group that is left out is not protected."""

    head: str | None = None
    """Attention heads: an attribute of the model config, a product `a*b`, or alternatives `a|b` (the first it has)."""
    intermediate: str | None = None
    """Neurons of the MLP, written like heads; numbers may occur in a product, as in `4*hidden_size`."""
    output: str | None = None
    """Outputs of the MLP's second map, written like heads."""


class RuleConfig(Section):
    """Which part of one parameter the units of a group own."""

    group: GroupName
    """Whose units own it."""
    parameter: str
    """Parameter name, `{base}` for the base model's prefix and `{layer}` for the layer number."""
    axis: int = Field(ge=0, le=1)
    """0: units own rows of the stored tensor; 1: they own columns."""
    layout: Literal["contiguous", "gate_up", "kv", "qkv", "experts", "experts_gate_up"] = "contiguous"
    """How the units lie along the axis: equal runs, gate and up halves, key/value heads, fused q-k-v, or by expert."""
    consumer: bool = False
    """The parameter only consumes the units: protected with them only under `method.softmask.include_consumers`."""
    optional: bool = False
    """Models without this parameter are fine."""


class SiteConfig(Section):
    """Where the units of one group can be multiplied."""

    group: GroupName
    """Whose units are multiplied."""
    module: str
    """Module name, with the placeholders of a rule."""
    position: Literal["input", "output", "experts"]
    """The module's input or output, or inside a module that runs all experts."""


class ArchitectureConfig(Section):
    """A table of units: who owns what, where gates sit, what stays unmasked (docs/internals/architecture_specs.md)."""

    objective: ObjectiveName
    """Pre-training objective of these networks."""
    units: UnitCountsConfig
    rules: list[RuleConfig] = Field(min_length=1)
    """Parameters that units own or read."""
    sites: list[SiteConfig] = Field(min_length=1)
    """One gate per group and layer."""
    unmasked: list[str]
    """Parameters that no unit owns, on purpose; placeholders as in rules, `*` matches anything."""
    lm_head: list[str] = Field(min_length=1)
    """Modules that turn hidden states into logits, one after the other."""
    embeddings: list[str] = Field(default=[])
    """Parameters between token ids and the first layer, for method freeze and `train.layer_lr_decay`; written like
    those of `unmasked`."""
    embedding_head: str | None = None
    """Module that does so in place of `lm_head` in models that have it, given the input embeddings as well."""
    key_value_heads: str | None = None
    """Number of key/value heads, written like heads; null: as many as heads."""
    logit_cap_attribute: str | None = None
    """Attribute of the model config with the cap c of logits c * tanh(logits / c); null: no cap."""
    position_offset: Annotated[int, Field(ge=0)] | Literal["pad_token_id"] = 0
    """Rows of the position embedding that no token of a block can use; `pad_token_id` where positions begin after that
    id, as in RoBERTa: pad_token_id + 1 of the model's config."""
    dropouts: list[str] | None = None
    """Attributes of the model config that are dropout probabilities of the network; null: the usual names."""

    @model_validator(mode="after")
    def _names_are_patterns(self) -> ArchitectureConfig:
        for key, names in (
            ("rules", [rule.parameter for rule in self.rules]),
            ("sites", [site.module for site in self.sites]),
        ):
            for index, name in enumerate(names):
                _check_placeholders(f"{key}.{index}", name, {"base", "layer"})
                if "{layer}" not in name:
                    raise ValueError(f"{key}.{index}: found {name!r}, expected a name with the placeholder {{layer}}")
        for index, name in enumerate(self.unmasked):
            _check_placeholders(f"unmasked.{index}", name, {"base", "layer"})
        for index, name in enumerate(self.embeddings):
            _check_placeholders(f"embeddings.{index}", name, {"base"})
        return self

    @model_validator(mode="after")
    def _groups_fit_together(self) -> ArchitectureConfig:
        counted = {group for group, count in self.units if count is not None}
        ruled = {rule.group for rule in self.rules}
        gated = [site.group for site in self.sites]
        if not counted == ruled == set(gated) or len(gated) != len(set(gated)):
            raise ValueError(
                f"units, rules and sites must name the same groups, each with one site; found units: "
                f"{_listed(counted)}, rules: {_listed(ruled)}, sites: {_listed(gated)}"
            )
        axes = [(rule.parameter, rule.axis) for rule in self.rules]
        twice = next((axis for axis in axes if axes.count(axis) > 1), None)
        if twice is not None:
            raise ValueError(f"rules: axis {twice[1]} of {twice[0]} found twice, allowed: one rule per axis")
        return self


def _check_placeholders(key: str, name: str, allowed: set[str]) -> None:
    found = set(re.findall(r"\{(.*?)\}", name))
    if found - allowed or name.count("{") != name.count("}"):
        raise ValueError(
            f"{key}: found {name!r}, allowed placeholders: {', '.join(f'{{{name}}}' for name in sorted(allowed))}"
        )


def _listed(groups: Iterable[str]) -> str:
    return ", ".join(sorted(groups)) or "none"
