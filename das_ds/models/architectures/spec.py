"""An architecture as a table: which parameters its units own, where their gates sit, what stays unmasked on purpose.

Patterns use `{base}` for the base model's prefix (`roberta`, `bert`) and `{layer}` for a layer number.

Whether a network has dropout of its own.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from das_ds.config import ObjectiveName
from das_ds.errors import ModelError
from das_ds.functional.axis_layouts import AXIS_LAYOUTS, Axis
from das_ds.functional.units import Ownership, UnitLayout, UnitRule, block_shape
from das_ds.models.vocabulary import vocabulary_parameters

DROPOUT_ATTRIBUTES = (
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "dropout",
    "embd_pdrop",
    "embedding_dropout",
    "hidden_dropout",
    "hidden_dropout_prob",
    "mlp_dropout",
    "resid_pdrop",
)
"""Config attributes that make two passes of one text differ; dropout of classification heads does not."""


@dataclass(frozen=True)
class GateSite:
    """Where the units of a group can be multiplied: the input or the output of one module per layer.

    `experts` is the input of the down projections inside a module that runs all experts (see `experts.py`).
    """

    group: str
    module: str
    position: Literal["input", "output", "experts"]


@dataclass(frozen=True)
class ArchitectureSpec:
    """The table of one architecture."""

    model_type: str
    objective: ObjectiveName
    """What these networks are pre-trained with."""
    units: dict[str, str]
    """Group -> number of units per layer: an attribute of the model config, a product such as `a*b` or `4*a`, or
    several of these with `|` between them, of which the first counts whose attributes are set."""
    rules: tuple[UnitRule, ...]
    sites: tuple[GateSite, ...]
    unmasked: tuple[str, ...]
    """Parameters that belong to no unit on purpose; `*` matches anything."""
    lm_head: tuple[str, ...]
    """Modules that turn hidden states into logits, one after the other."""
    embedding_head: str | None = None
    """Module that does so in place of `lm_head` in models that have it, given the input embeddings as well."""
    key_value_heads: str | None = None
    """Attribute of the model config with the number of key/value heads; None: as many as heads."""
    logit_cap_attribute: str | None = None
    """Attribute of the model config with the cap c of logits, c * tanh(logits / c), where there is one."""
    position_offset: int | Literal["pad_token_id"] = 0
    """Rows of the position embedding that no token of a block can use; `pad_token_id`: as many as are needed so that
    positions begin behind that id."""
    dropouts: tuple[str, ...] = DROPOUT_ATTRIBUTES
    """Attributes of the model config that are dropout probabilities of the network."""
    unsupported: Callable[[Any], str | None] = lambda config: None
    """What in a model config this table cannot describe, in words, or None."""

    @property
    def has_experts(self) -> bool:
        """Whether layers have experts, of which a token uses some."""
        return any(site.position == "experts" for site in self.sites)

    def max_sequence_length(self, model: PreTrainedModel) -> int:
        """Longest block that the model's position embedding allows; models without positions have no limit.

        Raises:
            ModelError: positions begin behind a padding index that the model's config lacks, or leave none.
        """
        num_positions = int(getattr(model.config, "max_position_embeddings", sys.maxsize))
        if self.position_offset != "pad_token_id":
            return num_positions - self.position_offset
        padding = model.config.pad_token_id
        if padding is None or not 0 <= padding < num_positions - 1:
            raise ModelError(
                f"pad_token_id of the model's config: found {padding}, allowed: 0 to {num_positions - 2}, because "
                f"positions of {self.model_type} begin behind it (max_position_embeddings: {num_positions})"
            )
        return num_positions - int(padding) - 1

    def logit_cap(self, model: PreTrainedModel) -> float | None:
        """c of `logit_cap_attribute`, or None."""
        cap = None if self.logit_cap_attribute is None else getattr(model.config, self.logit_cap_attribute)
        return None if cap is None else float(cap)

    def layout(self, model: PreTrainedModel) -> UnitLayout:
        """Apply the table to a real model.

        Raises:
            ModelError: a parameter the table neither masks nor lists as unmasked, a rule without a parameter, an axis
                whose size does not divide into the units, or a config the table cannot describe.
        """
        config = model.config
        obstacle = self.unsupported(config)
        if obstacle is not None:
            raise ModelError(f"the {self.model_type} architecture spec does not support {obstacle}")
        num_units = {group: self.count(config, attribute) for group, attribute in self.units.items()}
        shapes = {name: _full_shape(parameter) for name, parameter in model.named_parameters()}
        base = model.base_model_prefix
        ownerships = []
        for rule in self.rules:
            for layer in range(config.num_hidden_layers):
                name = rule.parameter.format(base=base, layer=layer)
                if name in shapes or not rule.optional:
                    ownerships.append(self._own(rule, name, layer, shapes, num_units, config))
        self._check_complete(shapes, {item.parameter for item in ownerships if not item.consumer}, base)
        vocabulary = frozenset(vocabulary_parameters(model))
        return UnitLayout(self.model_type, config.num_hidden_layers, num_units, tuple(ownerships), shapes, vocabulary)

    def gate_modules(self, model: PreTrainedModel) -> Iterator[tuple[GateSite, int, nn.Module]]:
        """(site, layer, module) of every gate of a real model."""
        for site in self.sites:
            for layer in range(model.config.num_hidden_layers):
                name = site.module.format(base=model.base_model_prefix, layer=layer)
                yield site, layer, self._module(model, name)

    def head(self, model: PreTrainedModel) -> list[Callable[[torch.Tensor], torch.Tensor]]:
        """What turns hidden states into logits, one after the other.

        Raises:
            ModelError: a module is missing.
        """
        name = self.embedding_head
        if name is not None and hasattr(model, name):
            embeddings = model.get_input_embeddings()
            return [lambda hidden: model.get_submodule(name)(hidden, embeddings)]
        return [self._module(model, name) for name in self.lm_head]

    def projection(self, model: PreTrainedModel) -> nn.Module:
        """The module whose output `head` returns as it is, or that contains it."""
        if self.embedding_head is not None and hasattr(model, self.embedding_head):
            return model.get_submodule(self.embedding_head)
        found: nn.Module = model.get_output_embeddings()
        return found

    def _module(self, model: PreTrainedModel, name: str) -> nn.Module:
        try:
            return model.get_submodule(name)
        except AttributeError as error:
            raise ModelError(
                f"the {self.model_type} architecture spec names a module that this model lacks: {name}"
            ) from error

    def count(self, config: Any, counts: str) -> int:
        """The number that an expression such as those of `units` names in a model config.

        Raises:
            ModelError: the config lacks it.
        """
        for product in counts.split("|"):
            values = [int(name) if name.isdigit() else getattr(config, name, None) for name in product.split("*")]
            factors = [value for value in values if isinstance(value, int)]
            if len(factors) == len(values):
                return math.prod(factors)
        raise ModelError(
            f"the {self.model_type} architecture spec names an attribute that this model's config lacks or that is no whole "
            f"number: {counts}"
        )

    def _own(
        self,
        rule: UnitRule,
        name: str,
        layer: int,
        shapes: dict[str, tuple[int, int, int]],
        num_units: dict[str, int],
        config: Any,
    ) -> Ownership:
        if name not in shapes:
            raise ModelError(f"the {self.model_type} architecture spec names a parameter that this model lacks: {name}")
        blocks, size, units = shapes[name][0], shapes[name][1 + rule.axis], num_units[rule.group]
        key_value_heads = units if self.key_value_heads is None else self.count(config, self.key_value_heads)
        try:
            owners = _owners(rule.layout, Axis(blocks, size, units, key_value_heads))
        except ValueError as error:
            raise ModelError(
                f"the {self.model_type} architecture spec does not fit {name}: axis {rule.axis} of {rule.group} units "
                f"({rule.layout}) has {error}"
            ) from error
        return Ownership(name, rule.group, layer, rule.axis, owners, rule.consumer)

    def _check_complete(self, shapes: dict[str, tuple[int, int, int]], owned: set[str], base: str) -> None:
        patterns = [_matcher(pattern, base) for pattern in self.unmasked]
        unknown = [n for n in shapes if n not in owned and not any(p.fullmatch(n) for p in patterns)]
        if unknown:
            raise ModelError(
                f"the {self.model_type} architecture spec does not know {len(unknown)} parameters of this model: "
                f"{', '.join(unknown[:3])}; each must be owned by a unit or listed as unmasked"
            )


def _matcher(pattern: str, base: str) -> re.Pattern[str]:
    parts = [re.escape(part.replace("{base}", base)).replace(r"\*", ".*") for part in pattern.split("{layer}")]
    return re.compile(r"\d+".join(parts))


@cache
def _owners(layout: str, axis: Axis) -> torch.Tensor:
    """One tensor for all equal axes, so that masks made from it are shared."""
    return AXIS_LAYOUTS[layout](axis)


def _full_shape(parameter: nn.Parameter) -> tuple[int, int, int]:
    # ZeRO-3 leaves an empty placeholder in the module; the real shape stays in ds_shape.
    return block_shape(getattr(parameter, "ds_shape", parameter.shape))


def has_dropout(config: PretrainedConfig, probabilities: Sequence[str] = DROPOUT_ATTRIBUTES) -> bool:
    """Whether any of these attributes of the network's config, as far as it has them, is above 0."""
    return any((getattr(config, name, None) or 0.0) > 0.0 for name in probabilities)
