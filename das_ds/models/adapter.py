"""An architecture as a table: which parameters its units own, where their gates sit, what stays unmasked on purpose.

Patterns use `{base}` for the base model's prefix (`roberta`, `bert`) and `{layer}` for the layer number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from das_ds.errors import ModelError
from das_ds.functional.units import Ownership, UnitLayout, UnitRule, matrix_shape


@dataclass(frozen=True)
class GateSite:
    """Where the units of a group can be multiplied: the input or the output of one module per layer."""

    group: str
    module: str
    position: Literal["input", "output"]


@dataclass(frozen=True)
class ArchitectureAdapter:
    """The table of one architecture."""

    model_type: str
    units: dict[str, str]
    """Group -> attribute of the model config that holds the number of units per layer."""
    rules: tuple[UnitRule, ...]
    sites: tuple[GateSite, ...]
    unmasked: tuple[str, ...]
    """Parameters that belong to no unit on purpose; `*` matches anything."""
    lm_head: str
    """Module that turns hidden states into logits."""
    position_offset: int = 0
    """Rows of the position embedding that no token of a block can use."""

    def max_sequence_length(self, model: PreTrainedModel) -> int:
        """Longest block that the model's position embedding allows."""
        return int(model.config.max_position_embeddings) - self.position_offset

    def layout(self, model: PreTrainedModel) -> UnitLayout:
        """Apply the table to a real model.

        Raises:
            ModelError: a parameter the table neither masks nor lists as unmasked, a rule without a parameter, or an
                axis whose size is no multiple of the number of units.
        """
        config = model.config
        num_units = {group: int(getattr(config, attribute)) for group, attribute in self.units.items()}
        shapes = {name: _full_shape(parameter) for name, parameter in model.named_parameters()}
        base = model.base_model_prefix
        ownerships = tuple(
            self._own(rule, rule.parameter.format(base=base, layer=layer), layer, shapes, num_units)
            for rule in self.rules
            for layer in range(config.num_hidden_layers)
        )
        self._check_complete(shapes, {item.parameter for item in ownerships if not item.reader}, base)
        return UnitLayout(self.model_type, config.num_hidden_layers, num_units, ownerships, shapes)

    def gate_modules(self, model: PreTrainedModel) -> Iterator[tuple[GateSite, int, nn.Module]]:
        """(site, layer, module) of every gate of a real model."""
        for site in self.sites:
            for layer in range(model.config.num_hidden_layers):
                yield site, layer, model.get_submodule(site.module.format(base=model.base_model_prefix, layer=layer))

    def _own(
        self, rule: UnitRule, name: str, layer: int, shapes: dict[str, tuple[int, int]], num_units: dict[str, int]
    ) -> Ownership:
        if name not in shapes:
            raise ModelError(f"the {self.model_type} adapter names a parameter that this model lacks: {name}")
        size, units = shapes[name][rule.axis], num_units[rule.group]
        if size % units:
            raise ModelError(
                f"the {self.model_type} adapter does not fit {name}: axis {rule.axis} has {size} entries, "
                f"which is no multiple of {units} {rule.group} units"
            )
        return Ownership(name, rule.group, layer, rule.axis, size // units, rule.reader)

    def _check_complete(self, shapes: dict[str, tuple[int, int]], owned: set[str], base: str) -> None:
        allowed = [re.escape(p.format(base=base)).replace(r"\*", ".*") for p in self.unmasked]
        unknown = [n for n in shapes if n not in owned and not any(re.fullmatch(p, n) for p in allowed)]
        if unknown:
            raise ModelError(
                f"the {self.model_type} adapter does not know {len(unknown)} parameters of this model: "
                f"{', '.join(unknown[:3])}; each must be owned by a unit or listed as unmasked"
            )


def _full_shape(parameter: nn.Parameter) -> tuple[int, int]:
    # ZeRO-3 leaves an empty placeholder in the module; the real shape stays in ds_shape.
    return matrix_shape(getattr(parameter, "ds_shape", parameter.shape))
