"""Step 1, propose: an architecture spec from the computation of the layers of a network, not from their names.

In a small network of the same class (`probe.py`) the output projection of attention is the first linear layer whose
input mixes positions; an output feature of the linear layers that feed it belongs to the heads whose context it
reaches. The down projection of the MLP is the linear layer that is fed neuron by neuron. Linear layers that fit no
axis layout are omitted, with the reason.
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
    find_embedding_patterns,
    find_layers,
    find_lm_head,
    find_position_offset,
    find_unmasked_patterns,
    guess_objective,
    list_layer_patterns,
)
from das_ds.models.inspect.trace import LayerFlow, TracedLinear, trace_layer
from das_ds.models.inspect.verify import broken_vectors, verify_table

SAMPLED_UNITS = 16
"""Units per group whose features are tested one by one."""

_Feeders = tuple[tuple[TracedLinear, str], ...]


@dataclass(frozen=True)
class Proposal:
    """A spec that fits the probe and the shapes of the real model."""

    spec: ArchitectureSpec
    reasons: dict[str, str]
    """Linear layer (relative to a transformer layer) or group -> why no unit owns it."""
    problems: dict[str, tuple[str, ...]]
    """Group -> contradictions found by closing its gates; empty if everything is verified."""


@dataclass(frozen=True)
class _Group:
    """Units, the linear layer that reads them, and the linear layers that compute them."""

    consumer: TracedLinear
    num_units: int
    feeders: _Feeders
    """The linear layers that compute the units, each with the layout of its output features."""

    @property
    def names(self) -> set[str]:
        """The consumer and the feeders."""
        return {self.consumer.name, *(linear.name for linear, _ in self.feeders)}


def propose_table(config: PretrainedConfig, objective: ObjectiveName | None = None) -> Proposal:
    """Trace small networks of a class until one gives a spec that fits the shapes of the real model.

    Args:
        config: of the real model, whose weights are not needed.
        objective: None: see `guess_objective`.

    Raises:
        ModelError: no spec can be proposed.
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
        # As in building the probe: the code of an unknown class may raise anything, and its failure is a reason.
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
    reasons |= {name: "did not run" for name in flow.unused}
    heads, key_value_heads = _find_heads(flow, config, reasons)
    mlp = _find_mlp(flow, config, heads.names if heads else set(), reasons)
    for linear in flow.linears:
        if not any(group and linear.name in group.names for group in (heads, mlp)):
            reasons.setdefault(linear.name, "feeds neither heads nor neurons")
    units: dict[str, str] = {}
    rules: list[UnitRule] = []
    sites: list[GateSite] = []
    if heads:
        units[HEAD] = "num_attention_heads"
        rules += [*_feeder_rules(heads, HEAD, prefix), _input_rule(heads.consumer, HEAD, prefix, consumer=False)]
        sites.append(GateSite(HEAD, f"{prefix}.{heads.consumer.name}", "input"))
    if mlp:
        units[INTERMEDIATE] = _find_size_expression(config, mlp.num_units)
        units[OUTPUT] = "hidden_size"
        rules += [
            *_feeder_rules(mlp, INTERMEDIATE, prefix),
            _input_rule(mlp.consumer, INTERMEDIATE, prefix, consumer=True),
        ]
        rules += _output_rules(mlp.consumer, OUTPUT, prefix, "contiguous")
        sites.append(_neuron_site(mlp, prefix))
        sites.append(GateSite(OUTPUT, f"{prefix}.{mlp.consumer.name}", "output"))
    if not rules:
        raise ModelError("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
    lm_head, cap = find_lm_head(model, objective)
    spec = ArchitectureSpec(
        model_type=config.model_type,
        objective=objective,
        units=units,
        rules=tuple(rules),
        sites=tuple(sites),
        unmasked=find_unmasked_patterns(model, prefix, rules),
        lm_head=lm_head,
        embeddings=find_embedding_patterns(model, prefix),
        key_value_heads=key_value_heads,
        logit_cap_attribute=cap,
        position_offset=find_position_offset(model),
    )
    problems = verify_table(model, spec)
    if problems:
        # Some vectors, such as the weights of norms, belong to single units; the trace sees linear layers only.
        spec = _add_vector_rules(model, spec, prefix)
        problems = verify_table(model, spec)
    return Proposal(spec, reasons, problems)


def _add_vector_rules(model: PreTrainedModel, spec: ArchitectureSpec, prefix: str) -> ArchitectureSpec:
    """The spec with rules for vectors, such as the weights of norms, whose entries serve single units.

    A vector after the gate of an output unit reads that unit and does not make it.
    """
    layout = spec.layout(model)
    names = {
        pattern.format(base=model.base_model_prefix, layer=0): pattern for pattern in list_layer_patterns(model, prefix)
    }
    rules = list(spec.rules)
    for group, num_units in layout.num_units.items():
        key_value_heads = spec.count(model.config, spec.key_value_heads) if spec.key_value_heads else num_units
        units = _sample_units(num_units)
        for name, lost in broken_vectors(model, spec, group, units).items():
            axis_layout = _match_layout(lost, Axis(1, lost.shape[1], num_units, key_value_heads), units)
            if name in names and axis_layout and not any(rule.parameter == names[name] for rule in spec.rules):
                rules.append(UnitRule(group, names[name], 0, axis_layout, consumer=group == OUTPUT))
    return replace(spec, rules=tuple(rules), unmasked=find_unmasked_patterns(model, prefix, rules))


def _find_heads(flow: LayerFlow, config: Any, reasons: dict[str, str]) -> tuple[_Group | None, str | None]:
    """The attention heads, and the expression that counts key/value heads (None: as many as heads).

    The number of key/value heads is the one with which most feeders fit a layout. Adds to `reasons`.
    """
    consumer = next((linear for linear in flow.linears if linear.name in flow.position_mixing), None)
    num_heads = getattr(config, "num_attention_heads", None)
    if consumer is None or not isinstance(num_heads, int) or consumer.in_features % num_heads:
        reasons[HEAD] = "no linear layer has a position-mixing input that divides into num_attention_heads"
        return None, None
    best: tuple[_Feeders, dict[str, str], str | None] | None = None
    for expression in (*_list_key_value_attributes(config), "1", None):
        count = num_heads if expression is None else int(getattr(config, expression, expression))
        if num_heads % count:
            continue
        fits, misfits = _match_feeders(flow, consumer, num_heads, count)
        if best is None or len(fits) > len(best[0]):
            best = fits, misfits, expression
    assert best is not None, "one key/value head for each head always divides"
    fits, misfits, expression = best
    reasons |= misfits
    if not fits:
        reasons[HEAD] = f"the linear layers that feed {consumer.name} do not divide into heads"
        return None, None
    is_grouped = any(layout in ("kv", "qkv") for _, layout in fits)
    return _Group(consumer, num_heads, fits), expression if is_grouped else None


def _find_mlp(flow: LayerFlow, config: Any, attention: set[str], reasons: dict[str, str]) -> _Group | None:
    """The neurons of the MLP, if exactly one linear layer outside attention is fed neuron by neuron."""
    candidates = []
    for linear in flow.linears:
        if linear.name in attention or linear.out_features != config.hidden_size:
            continue
        fits, misfits = _match_feeders(flow, linear, linear.in_features, 1)
        if fits and not misfits and not attention & {feeder.name for feeder, _ in fits}:
            candidates.append(_Group(linear, linear.in_features, fits))
    if len(candidates) == 1:
        return candidates[0]
    names = ", ".join(group.consumer.name for group in candidates)
    reasons["MLP"] = (
        f"{names} are all fed neuron by neuron" if candidates else "no linear layer is fed neuron by neuron"
    )
    return None


def _match_feeders(
    flow: LayerFlow, consumer: TracedLinear, num_units: int, num_key_value_heads: int
) -> tuple[_Feeders, dict[str, str]]:
    """Feeding linear layers with the layout of their features, and those that fit none with the reason."""
    units = _sample_units(num_units)
    linears = {linear.name: linear for linear in flow.linears}
    fits: list[tuple[TracedLinear, str]] = []
    misfits: dict[str, str] = {}
    for name, reached in flow.reachable_units(consumer, num_units, units).items():
        feeder = linears[name]
        layout = _match_layout(reached, Axis(1, feeder.out_features, num_units, num_key_value_heads), units)
        if reached.all() and feeder.out_features > consumer.in_features // num_units:
            # A single key/value head reaches all heads; a feeder wider than a head was mixed across heads.
            layout = None
        if layout is not None:
            fits.append((feeder, layout))
            continue
        found = "every feature of it reaches every unit" if reached.all() else "its features fit no known layout"
        misfits[name] = f"{found} at the input of {consumer.name}"
    return tuple(fits), misfits


def _sample_units(num_units: int) -> list[int]:
    """At most SAMPLED_UNITS units, evenly spaced, the first and the last among them."""
    return sorted({int(unit) for unit in torch.linspace(0, num_units - 1, min(num_units, SAMPLED_UNITS))})


def _match_layout(reached: torch.Tensor, axis: Axis, units: list[int]) -> str | None:
    """The first axis layout in which each of the units owns exactly the features that reached it."""
    return next((layout for layout in AXIS_LAYOUTS if torch.equal(reached, _owned_features(layout, axis, units))), None)


def _owned_features(layout: str, axis: Axis, units: list[int]) -> torch.Tensor:
    """(len(units), A) bool: the features that each unit owns in a layout; none if the sizes do not divide."""
    try:
        owners = AXIS_LAYOUTS[layout](axis)
    except ValueError:
        return torch.zeros(len(units), axis.size, dtype=torch.bool)
    return torch.stack([owners.eq(unit).any(dim=1) for unit in units])


def _list_key_value_attributes(config: Any) -> list[str]:
    """Attributes of a model config that may be the number of key/value heads."""
    return [
        name
        for name, value in config.to_dict().items()
        if type(value) is int and value > 0 and "head" in name and ("kv" in name or "key_value" in name)
    ]


def _feeder_rules(group: _Group, kind: str, prefix: str) -> list[UnitRule]:
    return [rule for linear, layout in group.feeders for rule in _output_rules(linear, kind, prefix, layout)]


def _output_rules(linear: TracedLinear, kind: str, prefix: str, layout: str) -> list[UnitRule]:
    """Rules for the weight and bias of a linear layer whose output features belong to units."""
    name = f"{prefix}.{linear.name}"
    rules = [UnitRule(kind, f"{name}.weight", 1 if linear.is_transposed else 0, layout)]
    return rules if linear.module.bias is None else [*rules, UnitRule(kind, f"{name}.bias", 0, layout)]


def _input_rule(linear: TracedLinear, kind: str, prefix: str, *, consumer: bool) -> UnitRule:
    """Rule for the weight of a linear layer whose input features are units."""
    return UnitRule(kind, f"{prefix}.{linear.name}.weight", 0 if linear.is_transposed else 1, consumer=consumer)


def _neuron_site(mlp: _Group, prefix: str) -> GateSite:
    first, layout = mlp.feeders[0]
    # A plain MLP is gated before its activation; a gated MLP only after gate and up projection were multiplied.
    if len(mlp.feeders) == 1 and layout == "contiguous" and first.out_features == mlp.num_units:
        return GateSite(INTERMEDIATE, f"{prefix}.{first.name}", "output")
    return GateSite(INTERMEDIATE, f"{prefix}.{mlp.consumer.name}", "input")


def _find_size_expression(config: Any, size: int) -> str:
    """The attribute of the model config, or multiple of `hidden_size`, that gives the number of neurons."""
    for name, value in config.to_dict().items():
        if type(value) is int and value == size and any(word in name for word in INNER_NAMES):
            return name
    if size % config.hidden_size == 0:
        return f"{size // config.hidden_size}*hidden_size"
    raise ModelError(f"no attribute of the model config gives the {size} neurons of a layer")
