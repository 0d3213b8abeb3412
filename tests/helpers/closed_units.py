"""Which rows and columns of a network's parameters get no gradient while some units are closed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from das_ds.functional.units import UnitLayout
from das_ds.models.architectures.spec import ArchitectureSpec
from das_ds.models.gates import UnitGates
from das_ds.models.language_model import LanguageModel

Units = set[tuple[str, int, int]]
"""(group, layer, unit)."""
NEGLIGIBLE = 1e-7
"""Gradients this small relative to the largest are rounding."""


class Slice(NamedTuple):
    """One row (axis 0) or column (axis 1) of one block of a parameter: entry of `UnitLayout.Ownership.units`."""

    parameter: str
    axis: int
    entry: int


def token_ids(rows: int = 4, length: int = 36) -> torch.Tensor:
    """Every token but the five special ones of the vocabulary of 100, at random places."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.cat((torch.arange(5, 100), torch.randint(5, 100, (rows * length - 95,), generator=generator)))
    return tokens[torch.randperm(len(tokens), generator=generator)].view(rows, length)


def gradient_sizes(
    model: PreTrainedModel, spec: ArchitectureSpec, layout: UnitLayout, closed: Units
) -> dict[Slice, float]:
    """Largest gradient of every slice, relative to the largest of all, for a loss that reads hidden states and logits.

    Args:
        model: without dropout; its gradients are replaced.
        spec: its architecture spec.
        layout: the table applied to the model.
        closed: units whose gates are 0; all others are 1.
    """
    gates = {group: torch.ones(layout.num_layers, 1, units) for group, units in layout.num_units.items()}
    for group, layer, unit in closed:
        gates[group][layer, :, unit] = 0.0
    ids = token_ids()
    generator = torch.Generator().manual_seed(1)
    model.zero_grad()
    with UnitGates(model, spec).active(gates, num_rows=len(ids)):
        targets = ids.flatten()[torch.randperm(ids.numel(), generator=generator)]
        hidden, losses = LanguageModel(model, spec)(ids, torch.arange(ids.numel()), targets)
    (losses.sum() + (hidden * torch.randn(hidden.shape, generator=generator)).sum()).backward()
    sizes = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        blocks = parameter.grad.abs().reshape(layout.shapes[name])
        for axis in (0, 1) if blocks.shape[2] > 1 else (0,):
            for entry, size in enumerate(blocks.amax(dim=2 - axis).flatten().tolist()):
                sizes[Slice(name, axis, entry)] = size
    largest = max(sizes.values())
    return {where: size / largest for where, size in sizes.items()}


def list_slices(layout: UnitLayout, units: Units) -> set[Slice]:
    """Slices that these units alone own or read, by the table; what several own counts when all of them are here."""
    found = set()
    for item in layout.ownerships:
        mine = {unit for group, layer, unit in units if (group, layer) == (item.group, item.layer)}
        for entry, owners in enumerate(item.units.tolist()):
            if {owner for owner in owners if owner >= 0} <= mine:
                found.add(Slice(item.parameter, item.axis, entry))
    return found


def hold_statistics(model: PreTrainedModel) -> None:
    """Let the root mean square of OLMo 2's query and key norms be constants for the gradient."""

    def norm(module: Any, x: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(x.detach().square().mean(dim=-1, keepdim=True) + module.variance_epsilon)
        return module.weight * (x * scale)

    for name, module in model.named_modules():
        if name.endswith(("q_norm", "k_norm")):
            module.forward = norm.__get__(module)


def gradients_of_gates(model: PreTrainedModel, spec: ArchitectureSpec, loss: Any) -> dict[str, torch.Tensor]:
    """|dL / dg| of gates of ones by plain autograd, group -> (L, U).

    Inner units of experts are gated by scaling columns of the down projection, all others by hooks of a line each.

    Args:
        model: without dropout.
        spec: its gate sites.
        loss: called without arguments, with the gates on.
    """
    layout = spec.layout(model)
    gates = {g: torch.ones(layout.num_layers, units, requires_grad=True) for g, units in layout.num_units.items()}
    hooks = []
    experts = []
    for site, layer, module in spec.gate_modules(model):
        gate = gates[site.group][layer]
        if site.position == "experts":
            experts.append((module, module.down_proj))
            scaled = module.down_proj.detach() * gate.view(len(module.down_proj), 1, -1)
            del module._parameters["down_proj"]
            module.down_proj = scaled
        elif site.position == "input":
            hooks.append(module.register_forward_pre_hook(lambda _, xs, gate=gate: _scaled(xs[0], gate)))
        else:
            hooks.append(module.register_forward_hook(lambda _, __, y, gate=gate: _scaled(y, gate)))
    gradients = torch.autograd.grad(loss(), list(gates.values()))
    for hook in hooks:
        hook.remove()
    for module, down_proj in experts:
        del module.down_proj
        module.register_parameter("down_proj", down_proj)
    return {group: gradient.abs() for group, gradient in zip(gates, gradients, strict=True)}


def _scaled(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return x * gate.repeat_interleave(x.shape[-1] // len(gate))


def sequence_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(B, S, V), (B, S) -> (B,) mean cross-entropy of each sequence."""
    return functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(dim=1)
