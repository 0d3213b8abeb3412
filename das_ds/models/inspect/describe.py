"""Step 3, describe: the spec of a model as text, which `das-ds inspect` prints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml
from transformers import PretrainedConfig, PreTrainedModel

from das_ds.config import ObjectiveName
from das_ds.errors import ModelError
from das_ds.functional.units import UnitLayout, UnitRule
from das_ds.models.architectures.from_config import spec_to_config
from das_ds.models.architectures.registry import ARCHITECTURES, spec_for
from das_ds.models.architectures.spec import ArchitectureSpec
from das_ds.models.inspect.probe import probe_models, skeleton
from das_ds.models.inspect.propose import propose_table
from das_ds.models.inspect.verify import verify_table

_TableRows = list[tuple[str, ...]]


@dataclass(frozen=True)
class UnitTable:
    """A registered or proposed spec and the result of its verification."""

    config: PretrainedConfig
    spec: ArchitectureSpec
    is_registered: bool
    reasons: dict[str, str]
    """Linear layer or group -> why no unit owns it."""
    problems: dict[str, tuple[str, ...]]
    """Group -> contradictions; see `verify.verify_table`."""

    def check(self) -> None:
        """Raises ModelError for a contradicted proposal; a registered spec was reviewed, which counts for more."""
        if self.problems and not self.is_registered:
            group, contradictions = next(iter(self.problems.items()))
            raise ModelError(
                f"the proposed table of {self.spec.model_type} is not verified for {', '.join(self.problems)} units; "
                f"do not use it unchanged; {group}: {contradictions[0]}"
            )

    def section(self) -> str:
        """YAML of `model: {architecture: ...}`, to be merged into a run config."""
        return yaml.safe_dump({"model": {"architecture": spec_to_config(self.spec)}}, sort_keys=False, width=120)

    def describe(self) -> str:
        """Units, the owners and shape of every parameter of a layer, gates, unmasked parameters, LM head."""
        spec = self.spec
        model = skeleton(self.config, spec.objective)
        layout = spec.layout(model)
        masked = {item.parameter for item in layout.ownerships if not item.consumer}
        num_masked = sum(layout.sizes[name] for name in masked)
        num_weights = sum(layout.sizes.values())
        origin = "registered" if self.is_registered else "proposed"
        blocks = [
            f"{spec.model_type}, {spec.objective}, {layout.num_layers} layers: {origin} table",
            _format_block("units of a layer", self._unit_rows(layout)),
            _format_block(f"key/value heads: {spec.key_value_heads or 'as many as heads'}", []),
            _format_block(f"parameters with units ({num_masked} of {num_weights} weights)", self._rule_rows(model)),
            _format_block("gates", self._gate_rows(model)),
            _format_block("stays unmasked", [(_fill_base(pattern, model),) for pattern in spec.unmasked]),
            _format_block("not classified", list(self.reasons.items())) if self.reasons else "",
            _format_block("LM head", [(module,) for module in spec.lm_head]),
        ]
        return "\n\n".join(block for block in blocks if block)

    def _unit_rows(self, layout: UnitLayout) -> _TableRows:
        return [
            (group, str(count), f"= {self.spec.units[group]}", self._verdict(group))
            for group, count in layout.num_units.items()
        ]

    def _rule_rows(self, model: PreTrainedModel) -> _TableRows:
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        rows: _TableRows = [("parameter", "shape", "units", "axis", "layout", "role")]
        for rule in self.spec.rules:
            name = _fill_base(rule.parameter, model)
            shape = _format_shape(rule, shapes, model)
            rows.append((name, shape, rule.group, str(rule.axis), rule.layout, _role(rule)))
        return rows

    def _gate_rows(self, model: PreTrainedModel) -> _TableRows:
        return [(site.group, f"{site.position} of {_fill_base(site.module, model)}") for site in self.spec.sites]

    def _verdict(self, group: str) -> str:
        contradictions = self.problems.get(group)
        if not contradictions:
            return "verified"
        return f"NOT verified: {contradictions[0]} ({len(contradictions)} in all)"


def inspect_model(config: PretrainedConfig, objective: ObjectiveName | None = None) -> UnitTable:
    """The registered spec of a model, else a proposed one; both are verified on a small network.

    Args:
        config: of the real model.
        objective: of a proposal; None: see `structure.guess_objective`.

    Raises:
        ModelError: no spec can be proposed, or the registered one is for another objective.
    """
    if config.model_type not in ARCHITECTURES:
        proposal = propose_table(config, objective)
        return UnitTable(config, proposal.spec, False, proposal.reasons, proposal.problems)
    spec = spec_for(config.model_type, getattr(config, "is_decoder", False))
    if objective not in (None, spec.objective):
        raise ModelError(
            f"objective: found {objective}, but the registered table of {spec.model_type} is for {spec.objective}"
        )
    probe = next(probe_models(config, spec.objective))
    return UnitTable(config, spec, True, {}, verify_table(probe, spec))


def _fill_base(pattern: str, model: PreTrainedModel) -> str:
    """The pattern with the prefix of the base model, but with `{layer}`."""
    return pattern.format(base=model.base_model_prefix, layer="{layer}")


def _format_shape(rule: UnitRule, shapes: dict[str, tuple[int, ...]], model: PreTrainedModel) -> str:
    """The shape in the first layer that has the parameter."""
    layers = range(model.config.num_hidden_layers)
    names = (rule.parameter.format(base=model.base_model_prefix, layer=layer) for layer in layers)
    return next(("x".join(map(str, shapes[name])) for name in names if name in shapes), "absent")


def _role(rule: UnitRule) -> str:
    return ("consumer" if rule.consumer else "owned") + (", optional" if rule.optional else "")


def _format_block(title: str, rows: Any) -> str:
    """A title and indented rows of aligned cells."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([title, *(f"  {line}" for line in lines)])
