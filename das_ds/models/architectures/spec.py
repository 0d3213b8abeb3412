"""Architecture spec: a table of which parameters the units own, where their gates are, and what stays unmasked.

Patterns use `{base}` for the base model's prefix (`roberta`, `bert`) and `{layer}` for a layer number.

Shape legend: E blocks of R rows and C columns of a parameter, see `functional.units`.
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
"""Attributes of model configs that make two passes over one text differ; dropout of classification heads does not."""


@dataclass(frozen=True)
class GateSite:
    """Where the units of a group are gated: the input or the output of one module per layer.

    `experts` is the input of the down projections inside a module that runs all experts (see `models/moe.py`).
    """

    group: str
    module: str
    position: Literal["input", "output", "experts"]


@dataclass(frozen=True)
class ArchitectureSpec:
    """The table of one architecture."""

    model_type: str
    objective: ObjectiveName
    """The objective that these models are pre-trained with."""
    units: dict[str, str]
    """Group -> number of units per layer: an attribute of the model config, a product such as `a*b` or `4*a`, or
    alternatives separated by `|`, of which the first counts whose attributes are all set."""
    rules: tuple[UnitRule, ...]
    sites: tuple[GateSite, ...]
    unmasked: tuple[str, ...]
    """Parameters that no unit owns, on purpose; `*` matches anything."""
    lm_head: tuple[str, ...]
    """Modules that turn hidden states into logits, applied one after the other."""
    embeddings: tuple[str, ...] = ()
    """Parameters between token ids and the first layer, patterns like those of `unmasked`."""
    embedding_head: str | None = None
    """Module that replaces `lm_head` in models that have it; it takes the input embeddings too."""
    key_value_heads: str | None = None
    """Attribute of the model config with the number of key/value heads; None: as many as heads."""
    logit_cap_attribute: str | None = None
    """Attribute of the model config with the soft cap c of logits, c * tanh(logits / c); None: no such attribute."""
    position_offset: int | Literal["pad_token_id"] = 0
    """Rows of the position embedding that no token can use; `pad_token_id`: positions begin after that id."""
    dropouts: tuple[str, ...] = DROPOUT_ATTRIBUTES
    """Attributes of the model config that are dropout probabilities of the model."""
    unsupported: Callable[[Any], str | None] = lambda config: None
    """Returns a description of what in a model config this spec cannot describe, or None."""

    @property
    def has_experts(self) -> bool:
        """Whether layers are mixtures of experts."""
        return any(site.position == "experts" for site in self.sites)

    def max_sequence_length(self, model: PreTrainedModel) -> int:
        """Largest number of tokens that the model's position embedding allows; no limit without one.

        Raises:
            ModelError: positions begin after a padding index that the model's config lacks, or leave none.
        """
        num_positions = int(getattr(model.config, "max_position_embeddings", sys.maxsize))
        if self.position_offset != "pad_token_id":
            return num_positions - self.position_offset
        padding = model.config.pad_token_id
        if padding is None or not 0 <= padding < num_positions - 1:
            raise ModelError(
                f"pad_token_id of the model's config: found {padding}, allowed: 0 to {num_positions - 2}, because "
                f"positions of {self.model_type} begin after it (max_position_embeddings: {num_positions})"
            )
        return num_positions - int(padding) - 1

    def logit_cap(self, model: PreTrainedModel) -> float | None:
        """The value of `logit_cap_attribute`, or None."""
        cap = None if self.logit_cap_attribute is None else getattr(model.config, self.logit_cap_attribute)
        return None if cap is None else float(cap)

    def layout(
        self,
        model: PreTrainedModel,
        full_shape: Callable[[nn.Parameter], torch.Size] = lambda parameter: parameter.shape,
    ) -> UnitLayout:
        """Apply the spec to a model.

        Args:
            model: any, also one whose parameters ZeRO-3 has sharded.
            full_shape: gives the shape of a complete parameter, of which ZeRO-3 leaves an empty vector in the model.

        Raises:
            ModelError: a parameter that the spec neither assigns to units nor lists as unmasked, a rule without a
                parameter, an axis whose size does not divide into the units, or a config that the spec cannot describe.
        """
        config = model.config
        unsupported = self.unsupported(config)
        if unsupported is not None:
            raise ModelError(f"the {self.model_type} architecture spec does not support {unsupported}")
        num_units = {group: self.count(config, attribute) for group, attribute in self.units.items()}
        shapes = {name: block_shape(full_shape(parameter)) for name, parameter in model.named_parameters()}
        base = model.base_model_prefix
        ownerships = []
        for rule in self.rules:
            for layer in range(config.num_hidden_layers):
                name = rule.parameter.format(base=base, layer=layer)
                if name in shapes or not rule.optional:
                    ownerships.append(self._assign_owners(rule, name, layer, shapes, num_units, config))
        self._check_complete(shapes, {item.parameter for item in ownerships if not item.consumer}, base)
        vocabulary = frozenset(vocabulary_parameters(model))
        return UnitLayout(self.model_type, config.num_hidden_layers, num_units, tuple(ownerships), shapes, vocabulary)

    def depths(self, model: PreTrainedModel) -> dict[str, int]:
        """Parameter -> 0 for embeddings, l + 1 for layer l of L, L + 1 for what follows the layers, and the LM head.

        An LM head that is tied to the embeddings is one of them.
        """
        base = model.base_model_prefix
        prefixes = {rule.parameter.partition("{layer}")[0].replace("{base}", base) for rule in self.rules}
        layer = re.compile(rf"(?:{'|'.join(re.escape(prefix) for prefix in sorted(prefixes))})(\d+)\.")
        embeddings = [_compile_pattern(pattern, base) for pattern in self.embeddings]

        def depth(name: str) -> int:
            if match := layer.match(name):
                return int(match[1]) + 1
            is_embedding = any(pattern.fullmatch(name) for pattern in embeddings)
            return 0 if is_embedding else int(model.config.num_hidden_layers) + 1

        # A tied parameter is listed once, in some networks under its name in the LM head.
        lowest: dict[nn.Parameter, int] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            lowest[parameter] = min(depth(name), lowest.get(parameter, depth(name)))
        return {name: lowest[parameter] for name, parameter in model.named_parameters()}

    def gate_modules(self, model: PreTrainedModel) -> Iterator[tuple[GateSite, int, nn.Module]]:
        """(site, layer, module) of every gate of a model."""
        for site in self.sites:
            for layer in range(model.config.num_hidden_layers):
                name = site.module.format(base=model.base_model_prefix, layer=layer)
                yield site, layer, self._get_module(model, name)

    def head(self, model: PreTrainedModel) -> list[Callable[[torch.Tensor], torch.Tensor]]:
        """Functions that turn hidden states (..., H) into logits (..., V), to be applied one after the other.

        Raises:
            ModelError: a module is missing.
        """
        name = self.embedding_head
        if name is not None and hasattr(model, name):
            embeddings = model.get_input_embeddings()
            return [lambda hidden: model.get_submodule(name)(hidden, embeddings)]
        return [self._get_module(model, name) for name in self.lm_head]

    def projection(self, model: PreTrainedModel) -> nn.Module:
        """The module whose output `head` returns unchanged, or that contains it."""
        if self.embedding_head is not None and hasattr(model, self.embedding_head):
            return model.get_submodule(self.embedding_head)
        output_embeddings: nn.Module = model.get_output_embeddings()
        return output_embeddings

    def _get_module(self, model: PreTrainedModel, name: str) -> nn.Module:
        try:
            return model.get_submodule(name)
        except AttributeError as error:
            raise ModelError(
                f"the {self.model_type} architecture spec names a module that this model lacks: {name}"
            ) from error

    def count(self, config: Any, expression: str) -> int:
        """Evaluate an expression such as those of `units` on a model config.

        Raises:
            ModelError: the config lacks an attribute of every alternative.
        """
        for product in expression.split("|"):
            values = [int(name) if name.isdigit() else getattr(config, name, None) for name in product.split("*")]
            factors = [value for value in values if isinstance(value, int)]
            if len(factors) == len(values):
                return math.prod(factors)
        raise ModelError(
            f"the {self.model_type} architecture spec names an attribute that this model's config lacks or that is not "
            f"an integer: {expression}"
        )

    def _assign_owners(
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
        blocks = shapes[name][0]
        size = shapes[name][1 + rule.axis]
        units = num_units[rule.group]
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
        patterns = [_compile_pattern(pattern, base) for pattern in self.unmasked]
        unknown = [
            name for name in shapes if name not in owned and not any(pattern.fullmatch(name) for pattern in patterns)
        ]
        if unknown:
            raise ModelError(
                f"the {self.model_type} architecture spec does not know {len(unknown)} parameters of this model: "
                f"{', '.join(unknown[:3])}; each must be owned by a unit or listed as unmasked"
            )


def _compile_pattern(pattern: str, base: str) -> re.Pattern[str]:
    parts = [re.escape(part.replace("{base}", base)).replace(r"\*", ".*") for part in pattern.split("{layer}")]
    return re.compile(r"\d+".join(parts))


@cache
def _owners(layout: str, axis: Axis) -> torch.Tensor:
    """(size, N) owners; cached, so that equal axes share one tensor and the masks made from it."""
    return AXIS_LAYOUTS[layout](axis)


def has_dropout(config: PretrainedConfig, probabilities: Sequence[str] = DROPOUT_ATTRIBUTES) -> bool:
    """Whether the model has dropout: any of these attributes of its config, if present, is above 0."""
    return any((getattr(config, name, None) or 0.0) > 0.0 for name in probabilities)
