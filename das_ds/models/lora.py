"""LoRA: low-rank adapters of linear layers, W = W0 + s B A with s = alpha / r (Hu et al., ICLR 2022), through peft.

Which rows and columns of A and B units own, attaching the adapters, merging them into W0, and files in peft's format.

Shape legend: r rank; I inputs, O outputs of a linear layer; A is (r, I), B is (O, r).
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from das_ds.config import LoraConfig
from das_ds.errors import ConfigError, ModelError
from das_ds.functional.units import Ownership, UnitLayout, block_shape
from das_ds.user_files import read_text, require_file

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
PLAIN_SETTINGS: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "use_rslora": (False, None),
    "use_dora": (False, None),
    "alpha_pattern": ({}, None),
    "rank_pattern": ({}, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
}
"""Keys of peft's adapter_config.json -> values that mean plain LoRA; the first is peft's default."""
BASE_LAYER = "base_layer"
"""Name under which peft keeps the module that it adapts."""

Weights = dict[str, torch.Tensor]
"""Parameter name -> values."""


@dataclass(frozen=True)
class AdaptedLinear:
    """One adapted linear layer, by the names of its parameters."""

    weight: str
    """W0 in the network without adapters."""
    a: str
    """A in the network with adapters."""
    b: str
    """B in the network with adapters."""
    rank: int
    num_inputs: int
    num_outputs: int
    transposed: bool
    """W0 is stored as (I, O), as in GPT-2's Conv1D, and not as (O, I)."""

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """A and B -> (E, R, C) as in `functional.units`."""
        return {
            self.a: block_shape((self.rank, self.num_inputs)),
            self.b: block_shape((self.num_outputs, self.rank)),
        }


@dataclass(frozen=True)
class Lora:
    """The adapters of one network."""

    config: LoraConfig
    linears: tuple[AdaptedLinear, ...]

    @classmethod
    def plan(cls, model: PreTrainedModel, layout: UnitLayout, config: LoraConfig) -> Lora:
        """Choose the linear layers to adapt; call it before `attach`, which changes their names.

        Raises:
            ConfigError: a target that matches no linear layer with units, or a rank above the smallest side of one.
            ModelError: no linear layer has units.
        """
        modules = _select_targets(model, layout, config.target_modules)
        linears = tuple(_describe_linear(name, model.get_submodule(name), config.rank) for name in modules)
        smallest = min(linears, key=lambda linear: min(linear.num_inputs, linear.num_outputs))
        max_rank = min(smallest.num_inputs, smallest.num_outputs)
        if config.rank > max_rank:
            raise ConfigError(
                f"model.lora.rank: found {config.rank}, allowed: 1 to {max_rank}, the smaller side of {smallest.weight}"
            )
        return cls(config, linears)

    def attach(self, model: PreTrainedModel, *, seed: int, weights: Path | None = None) -> None:
        """Freeze the network and wrap the chosen linear layers with adapters: A random by the seed, B zero.

        Args:
            model: the network, changed in place.
            seed: seed of A.
            weights: folder of saved adapters to start from.

        Raises:
            ConfigError: peft is not installed.
            ModelError: the saved adapters cannot be read or belong to another network or config.
        """
        peft = _import_peft()
        with torch.random.fork_rng():
            peft.inject_adapter_in_model(peft.LoraConfig(**self._peft_settings()), model)
        parameters = dict(model.named_parameters())
        adapters = self._initialize(seed) if weights is None else self._load(weights)
        for name, values in adapters.items():
            # peft creates adapters in the dtype of the frozen weights, which under ZeRO-3 may already be bf16; they are
            # trained in float32.
            parameters[name].data = values

    def layout(self, layout: UnitLayout) -> UnitLayout:
        """The unit layout of the adapters, from that of the network without them."""
        return adapt_layout(layout, self.linears)

    def base_names(self, model: PreTrainedModel) -> dict[str, str]:
        """Name of every base weight in the network with adapters -> its name in the network without them."""
        adapters = self._peft_keys()
        return {name: _strip_base_layer(name) for name, _ in model.named_parameters() if name not in adapters}

    @property
    def adapter_names(self) -> list[str]:
        """Parameters of the adapters in the network."""
        return list(self._peft_keys())

    def adapted(self, weight: str) -> AdaptedLinear | None:
        """The adapted layer whose W0 has this name in the network without adapters; None: it has no adapter."""
        return next((linear for linear in self.linears if linear.weight == weight), None)

    def merge(self, linear: AdaptedLinear, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """W0 + (alpha / r) B A in float32, a new tensor.

        Args:
            linear: an adapted layer.
            weight: W0.
            a: (r, I).
            b: (O, r).
        """
        scale = self.config.alpha / self.config.rank
        return add_low_rank_update(weight, a, b, scale, transposed=linear.transposed).contiguous()

    def save(self, folder: Path, adapters: Weights, base: str | None) -> None:
        """Write adapters in peft's format, for `PeftModel.from_pretrained`, to an empty folder."""
        tensors = {key: adapters[name].contiguous() for name, key in self._peft_keys().items()}
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        peft_config = _import_peft().LoraConfig(
            **self._peft_settings(), base_model_name_or_path=base, inference_mode=True
        )
        peft_config.save_pretrained(folder)

    def _initialize(self, seed: int) -> Weights:
        """As peft does: A like the weight of `nn.Linear`, B zero."""
        adapters: Weights = {}
        generator = torch.Generator().manual_seed(seed)
        for linear in self.linears:
            a = torch.empty(linear.rank, linear.num_inputs)
            adapters[linear.a] = nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            adapters[linear.b] = torch.zeros(linear.num_outputs, linear.rank)
        return adapters

    def _load(self, folder: Path) -> Weights:
        path = folder / WEIGHTS_FILE
        try:
            settings = json.loads(read_text(folder / CONFIG_FILE))
            require_file(path)
            tensors = load_file(path)
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            raise ModelError(f"{folder}: cannot read the adapters: {error}") from error
        if not isinstance(settings, dict):
            raise ModelError(f"{folder / CONFIG_FILE}: found {type(settings).__name__}, expected peft's JSON object")
        for key, allowed in PLAIN_SETTINGS.items():
            if settings.get(key, allowed[0]) not in allowed:
                raise ModelError(
                    f"{folder / CONFIG_FILE}: {key}: found {settings[key]!r}, expected {allowed[0]!r}, as in adapters "
                    "of das_ds; another scale or form would be trained as if it were plain LoRA"
                )
        found = {key: tuple(values.shape) for key, values in tensors.items()}
        shapes = {name: shape[1:] for linear in self.linears for name, shape in linear.shapes.items()}
        expected = {key: shapes[name] for name, key in self._peft_keys().items()}
        if found != expected or settings.get("lora_alpha") != self.config.alpha:
            differing = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
            raise ModelError(
                f"{folder}: adapters of another network or config: alpha {settings.get('lora_alpha')}, expected "
                f"{self.config.alpha}; tensors that differ: {', '.join(differing[:3]) or 'none'}"
            )
        return {name: tensors[key] for name, key in self._peft_keys().items()}

    def _peft_keys(self) -> dict[str, str]:
        """Name of an adapter's parameter in the network -> its key in peft's file."""
        names = [name for linear in self.linears for name in (linear.a, linear.b)]
        return {name: f"base_model.model.{name.replace('.default.', '.')}" for name in names}

    def _peft_settings(self) -> dict[str, object]:
        return {
            "r": self.config.rank,
            "lora_alpha": self.config.alpha,
            "lora_dropout": self.config.dropout,
            "target_modules": [linear.weight.removesuffix(".weight") for linear in self.linears],
            "fan_in_fan_out": all(linear.transposed for linear in self.linears),
        }


def adapt_layout(layout: UnitLayout, linears: Iterable[AdaptedLinear]) -> UnitLayout:
    """The unit layout of a network of which only the adapters are trained.

    An output of W is a row of B, and an input of W is a column of A, along an axis of the same length; so the units
    that own (or read) one also own (or read) the other. If units own only outputs of W, then A serves all of them and
    has no owner; likewise B if units own only inputs. Weights without adapter are frozen and need no mask.
    """
    by_weight = {linear.weight: linear for linear in linears}
    return replace(
        layout,
        ownerships=tuple(
            _move_to_adapter(item, by_weight[item.parameter])
            for item in layout.ownerships
            if item.parameter in by_weight
        ),
        shapes={name: shape for linear in by_weight.values() for name, shape in linear.shapes.items()},
        vocabulary=frozenset(),
        adapted=layout.ownerships,
    )


def add_low_rank_update(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, *, transposed: bool
) -> torch.Tensor:
    """W0 + s B A in float32.

    Args:
        weight: W0, (O, I), or (I, O) where `transposed`.
        a: (r, I).
        b: (O, r).
        scale: s.
        transposed: how W0 and the result are stored.
    """
    update = scale * (b.float() @ a.float())
    return weight.float() + (update.T if transposed else update)


def _move_to_adapter(item: Ownership, linear: AdaptedLinear) -> Ownership:
    """Ownership of outputs of W0 -> of rows of B; of inputs of W0 -> of columns of A."""
    owns_outputs = (item.axis == 1) if linear.transposed else (item.axis == 0)
    return replace(item, parameter=linear.b if owns_outputs else linear.a, axis=0 if owns_outputs else 1)


def _select_targets(model: PreTrainedModel, layout: UnitLayout, targets: list[str]) -> list[str]:
    """Names of the modules to adapt, in the order of the architecture spec."""
    owned = dict.fromkeys(item.parameter for item in layout.ownerships)
    names = [name.removesuffix(".weight") for name in owned if name.endswith(".weight")]
    modules = [name for name in names if isinstance(model.get_submodule(name), nn.Linear | Conv1D)]
    experts = [name for name in owned if layout.shapes[name][0] > 1]
    if not modules:
        raise ModelError(f"model.lora: units of {layout.model_type} own no linear layer that could be adapted")
    kinds = ", ".join(dict.fromkeys(_name_in_layer(name) for name in modules))
    for target in targets:
        if not any(_ends_in(name, target) for name in modules):
            note = (
                f" (the stacked weights of experts take no adapters: {_name_in_layer(experts[0])})" if experts else ""
            )
            raise ConfigError(f"model.lora.target_modules: found {target}, allowed: {kinds}, or an end of these{note}")
    if experts and not targets:
        logger.warning(
            "model.lora: the stacked weights of experts take no adapters and stay frozen: %s",
            ", ".join(dict.fromkeys(_name_in_layer(name) for name in experts)),
        )
    return [name for name in modules if not targets or any(_ends_in(name, target) for target in targets)]


def _strip_base_layer(name: str) -> str:
    """The name of a base weight in the network without peft."""
    return name.replace(f".{BASE_LAYER}.", ".")


def _name_in_layer(name: str) -> str:
    """The part of a name after the layer number."""
    return re.sub(r"^.*?\.\d+\.", "", name)


def _ends_in(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _describe_linear(name: str, module: nn.Module, rank: int) -> AdaptedLinear:
    # Not from the shape of the weight, which under ZeRO-3 is an empty placeholder.
    if isinstance(module, nn.Linear):
        num_inputs = module.in_features
        num_outputs = module.out_features
    else:
        assert isinstance(module, Conv1D), "selected among linear layers"
        num_inputs = module.nx
        num_outputs = module.nf
    return AdaptedLinear(
        weight=f"{name}.weight",
        a=f"{name}.lora_A.default.weight",
        b=f"{name}.lora_B.default.weight",
        rank=rank,
        num_inputs=num_inputs,
        num_outputs=num_outputs,
        transposed=isinstance(module, Conv1D),
    )


def _import_peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            f"model.lora: needs the package peft, which cannot be imported ({error}); pip install 'das_ds[lora]'"
        ) from error
    return peft
