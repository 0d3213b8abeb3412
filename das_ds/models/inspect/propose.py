"""Proposing a table of units for an architecture that has none, from what its layers do, not what they are called.

In a small network of the same class (`probe.py`) the attention's output map is the first map of a layer whose input
mixes positions; a feature of the maps that feed it belongs to the heads whose context it reaches. The MLP's second map
is the one that is fed neuron by neuron. What fits no layout is left out, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from das_ds.config import ObjectiveName
from das_ds.errors import DasError, ModelError, first_line
from das_ds.functional.axis_layouts import AXIS_LAYOUTS, Axis
from das_ds.functional.units import HEAD, INTERMEDIATE, OUTPUT, UnitRule
from das_ds.models.architectures.spec import ArchitectureSpec, GateSite
from das_ds.models.inspect.probe import INNER_NAMES, probe_models, skeleton
from das_ds.models.inspect.structure import (
    find_layers,
    find_lm_head,
    find_position_offset,
    guess_objective,
    layer_patterns,
    unmasked_patterns,
)
from das_ds.models.inspect.trace import LayerFlow, TracedLinear, trace_layer
from das_ds.models.inspect.verify import broken_vectors, verify_table

SAMPLED_UNITS = 16
"""Units of a group whose features are looked at one by one."""

_Feeders = tuple[tuple[TracedLinear, str], ...]


@dataclass(frozen=True)
class Proposal:
    """A table that holds on the probe and fits the shapes of the real model."""

    spec: ArchitectureSpec
    reasons: dict[str, str]
    """Map (relative to a layer) or group -> why no unit owns it."""
    problems: dict[str, tuple[str, ...]]
    """Group -> what closing its gates contradicted; empty where all is verified."""


@dataclass(frozen=True)
class _Group:
    """The units that one map takes, and the maps that make them."""

    consumer: TracedLinear
    num_units: int
    feeders: _Feeders
    """The maps that make them, each with the layout of its features."""

    @property
    def names(self) -> set[str]:
        """All maps that take part."""
        return {self.consumer.name, *(item.name for item, _ in self.feeders)}


def propose_table(config: PretrainedConfig, objective: ObjectiveName | None = None) -> Proposal:
    """Look at small networks of a class until one gives a table that fits the real model's shapes.

    Args:
        config: of the real model, whose weights are not needed.
        objective: None: what `config.architectures` says, else masked language modeling where the class exists.

    Raises:
        ModelError: nothing can be proposed.
    """
    objective = objective or guess_objective(config)
    reasons: list[str] = []
    for probe in probe_models(config, objective):
        try:
            proposal = _propose(probe, objective)
            proposal.spec.layout(skeleton(config, objective))
        except DasError as error:
            reasons.append(str(error))
            continue
        # As in building the probe: code of an unknown class, whose failure is a reason.
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {first_line(error)}")
            continue
        return proposal
    raise ModelError(f"no table can be proposed for {config.model_type}: {'; '.join(dict.fromkeys(reasons))}")


def _propose(model: PreTrainedModel, objective: ObjectiveName) -> Proposal:
    config = model.config
    prefix, layer = find_layers(model)
    flow = trace_layer(model, layer)
    reasons = {name: "runs several times in one pass" for name in flow.repeated}
    reasons |= {name: "did not run" for name in flow.idle}
    heads, key_value_heads = _heads(flow, config, reasons)
    mlp = _mlp(flow, config, heads.names if heads else set(), reasons)
    for item in flow.maps:
        if not any(group and item.name in group.names for group in (heads, mlp)):
            reasons.setdefault(item.name, "feeds neither heads nor neurons")
    units: dict[str, str] = {}
    rules: list[UnitRule] = []
    sites: list[GateSite] = []
    if heads:
        units[HEAD] = "num_attention_heads"
        rules += [*_made(heads, HEAD, prefix), _taken(heads.consumer, HEAD, prefix, consumer=False)]
        sites.append(GateSite(HEAD, f"{prefix}.{heads.consumer.name}", "input"))
    if mlp:
        units |= {INTERMEDIATE: _expression(config, mlp.num_units), OUTPUT: "hidden_size"}
        rules += [*_made(mlp, INTERMEDIATE, prefix), _taken(mlp.consumer, INTERMEDIATE, prefix, consumer=True)]
        rules += _given(mlp.consumer, OUTPUT, prefix, "contiguous")
        sites += [_neuron_site(mlp, prefix), GateSite(OUTPUT, f"{prefix}.{mlp.consumer.name}", "output")]
    if not rules:
        raise ModelError("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
    lm_head, cap = find_lm_head(model, objective)
    spec = ArchitectureSpec(
        model_type=config.model_type,
        objective=objective,
        units=units,
        rules=tuple(rules),
        sites=tuple(sites),
        unmasked=unmasked_patterns(model, prefix, rules),
        lm_head=lm_head,
        key_value_heads=key_value_heads,
        logit_cap_attribute=cap,
        position_offset=find_position_offset(model),
    )
    problems = verify_table(model, spec)
    if problems:
        spec = _with_vectors(model, spec, prefix)
        problems = verify_table(model, spec)
    return Proposal(spec, reasons, problems)


def _with_vectors(model: PreTrainedModel, spec: ArchitectureSpec, prefix: str) -> ArchitectureSpec:
    """The table with rules for vectors, such as those of norms, whose entries serve single units.

    What lies behind the gate of an output only reads that unit.
    """
    layout = spec.layout(model)
    names = {
        pattern.format(base=model.base_model_prefix, layer=0): pattern for pattern in layer_patterns(model, prefix)
    }
    rules = list(spec.rules)
    for group, num_units in layout.num_units.items():
        key_value_heads = spec.count(model.config, spec.key_value_heads) if spec.key_value_heads else num_units
        units = _sample(num_units)
        for name, lost in broken_vectors(model, spec, group, units).items():
            axis_layout = _layout(lost, Axis(1, lost.shape[1], num_units, key_value_heads), units)
            if name in names and axis_layout and not any(rule.parameter == names[name] for rule in spec.rules):
                rules.append(UnitRule(group, names[name], 0, axis_layout, consumer=group == OUTPUT))
    return replace(spec, rules=tuple(rules), unmasked=unmasked_patterns(model, prefix, rules))


def _heads(flow: LayerFlow, config: Any, reasons: dict[str, str]) -> tuple[_Group | None, str | None]:
    consumer = next((item for item in flow.maps if item.name in flow.mixing), None)
    num_heads = getattr(config, "num_attention_heads", None)
    if consumer is None or not isinstance(num_heads, int) or consumer.sizes[0] % num_heads:
        reasons[HEAD] = "no linear map takes a mixture of positions that divides into num_attention_heads"
        return None, None
    best: tuple[_Feeders, dict[str, str], str | None] | None = None
    for expression in (*_key_value_attributes(config), "1", None):
        count = num_heads if expression is None else int(getattr(config, expression, expression))
        if num_heads % count:
            continue
        fits, misfits = _fitting(flow, consumer, num_heads, count)
        if best is None or len(fits) > len(best[0]):
            best = fits, misfits, expression
    assert best is not None, "one key/value head for each head always divides"
    fits, misfits, expression = best
    reasons |= misfits
    if not fits:
        reasons[HEAD] = f"what feeds {consumer.name} does not divide into heads"
        return None, None
    is_grouped = any(layout in ("kv", "qkv") for _, layout in fits)
    return _Group(consumer, num_heads, fits), expression if is_grouped else None


def _mlp(flow: LayerFlow, config: Any, attention: set[str], reasons: dict[str, str]) -> _Group | None:
    found = []
    for item in flow.maps:
        if item.name in attention or item.sizes[1] != config.hidden_size:
            continue
        fits, misfits = _fitting(flow, item, item.sizes[0], 1)
        if fits and not misfits and not attention & {feeder.name for feeder, _ in fits}:
            found.append(_Group(item, item.sizes[0], fits))
    if len(found) == 1:
        return found[0]
    names = ", ".join(group.consumer.name for group in found)
    reasons["MLP"] = f"{names} are all fed neuron by neuron" if found else "no linear map is fed neuron by neuron"
    return None


def _fitting(
    flow: LayerFlow, consumer: TracedLinear, num_units: int, num_key_value_heads: int
) -> tuple[_Feeders, dict[str, str]]:
    """Feeding maps with the layout that describes them, and those that none describes with the reason."""
    units = _sample(num_units)
    maps = {item.name: item for item in flow.maps}
    fits, misfits = [], {}
    for name, reached in flow.reachable_units(consumer, num_units, units).items():
        layout = _layout(reached, Axis(1, maps[name].sizes[1], num_units, num_key_value_heads), units)
        if reached.all() and maps[name].sizes[1] > consumer.sizes[0] // num_units:
            # One key/value head for all, unless it is wider than a head: then something mixed all heads.
            layout = None
        if layout is not None:
            fits.append((maps[name], layout))
            continue
        found = "every feature of it reaches every unit" if reached.all() else "its features fit no known layout"
        misfits[name] = f"{found} at the input of {consumer.name}"
    return tuple(fits), misfits


def _sample(num_units: int) -> list[int]:
    return sorted({int(unit) for unit in torch.linspace(0, num_units - 1, min(num_units, SAMPLED_UNITS))})


def _layout(reached: torch.Tensor, axis: Axis, units: list[int]) -> str | None:
    """The first layout that gives each of the units what reached it."""
    return next((layout for layout in AXIS_LAYOUTS if torch.equal(reached, _owned(layout, axis, units))), None)


def _owned(layout: str, axis: Axis, units: list[int]) -> torch.Tensor:
    """(len(units), A): which features a layout gives to each unit; nothing where its sizes do not divide."""
    try:
        owners = AXIS_LAYOUTS[layout](axis)
    except ValueError:
        return torch.zeros(len(units), axis.size, dtype=torch.bool)
    return torch.stack([owners.eq(unit).any(dim=1) for unit in units])


def _key_value_attributes(config: Any) -> list[str]:
    return [
        name
        for name, value in config.to_dict().items()
        if type(value) is int and value > 0 and "head" in name and ("kv" in name or "key_value" in name)
    ]


def _made(group: _Group, kind: str, prefix: str) -> list[UnitRule]:
    return [rule for item, layout in group.feeders for rule in _given(item, kind, prefix, layout)]


def _given(item: TracedLinear, kind: str, prefix: str, layout: str) -> list[UnitRule]:
    """Weight and bias of a map whose features belong to units."""
    name = f"{prefix}.{item.name}"
    rules = [UnitRule(kind, f"{name}.weight", 1 if item.is_transposed else 0, layout)]
    return rules if item.module.bias is None else [*rules, UnitRule(kind, f"{name}.bias", 0, layout)]


def _taken(item: TracedLinear, kind: str, prefix: str, *, consumer: bool) -> UnitRule:
    """The weight of a map that takes units."""
    return UnitRule(kind, f"{prefix}.{item.name}.weight", 0 if item.is_transposed else 1, consumer=consumer)


def _neuron_site(mlp: _Group, prefix: str) -> GateSite:
    first, layout = mlp.feeders[0]
    # A single first map is gated before the activation; gate and up projection only where they have met.
    if len(mlp.feeders) == 1 and layout == "contiguous" and first.sizes[1] == mlp.num_units:
        return GateSite(INTERMEDIATE, f"{prefix}.{first.name}", "output")
    return GateSite(INTERMEDIATE, f"{prefix}.{mlp.consumer.name}", "input")


def _expression(config: Any, size: int) -> str:
    """What of the model config gives the number of neurons."""
    named = [name for name, value in config.to_dict().items() if type(value) is int and value == size]
    for name in named:
        if any(part in name for part in INNER_NAMES):
            return name
    if size % config.hidden_size == 0:
        return f"{size // config.hidden_size}*hidden_size"
    raise ModelError(f"no attribute of the model config gives the {size} neurons of a layer")
