"""Low-rank adapters of linear maps, W = W0 + s B A, and which of their rows and columns units own.

Shape legend: r rank; I inputs, O outputs of the map; A is (r, I), B is (O, r).

Low-rank adapters (LoRA) of a network's linear maps, through peft: attaching, merging, and files in peft's format.
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


@dataclass(frozen=True)
class AdaptedLinear:
    """One adapted linear map by the names of its parameters."""

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
    """W0 is stored (I, O) as in GPT-2's Conv1D and not (O, I)."""

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """A and B -> (E, R, C)."""
        return {
            self.a: block_shape((self.rank, self.num_inputs)),
            self.b: block_shape((self.num_outputs, self.rank)),
        }


def adapt_layout(layout: UnitLayout, maps: Iterable[AdaptedLinear]) -> UnitLayout:
    """The structure of a network of which only the adapters are trained.

    An output of W is a row of B and an input of W is a column of A, along an axis of the same length, so what owns or
    reads the one owns or reads the other. A where only outputs are owned, and B where only inputs are, belong to all
    units together and thus to none. What is not adapted is frozen and needs no protection.
    """
    by_weight = {item.weight: item for item in maps}
    return replace(
        layout,
        ownerships=tuple(
            _on_adapter(item, by_weight[item.parameter]) for item in layout.ownerships if item.parameter in by_weight
        ),
        shapes={name: shape for item in by_weight.values() for name, shape in item.shapes.items()},
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


def _on_adapter(item: Ownership, adapted: AdaptedLinear) -> Ownership:
    owns_outputs = (item.axis == 1) if adapted.transposed else (item.axis == 0)
    return replace(item, parameter=adapted.b if owns_outputs else adapted.a, axis=0 if owns_outputs else 1)


logger = logging.getLogger(__name__)

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
PLAIN_SETTINGS: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "use_rslora": (False, None),
    "use_dora": (False, None),
    "alpha_pattern": ({}, None),
    "rank_pattern": ({}, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
}
"""Of peft's adapter_config.json -> values that mean plain LoRA; the first is peft's default."""
BASE_LAYER = "base_layer"
"""Where peft puts the module that it adapts."""

Weights = dict[str, torch.Tensor]
"""Name of an adapter's parameter in the network -> values."""


@dataclass(frozen=True)
class Lora:
    """The adapters of one network."""

    config: LoraConfig
    maps: tuple[AdaptedLinear, ...]

    @classmethod
    def plan(cls, model: PreTrainedModel, layout: UnitLayout, config: LoraConfig) -> Lora:
        """Choose the linear maps, before `attach` changes their names.

        Raises:
            ConfigError: a target that is no linear map which units own, or a rank above the smallest map's.
            ModelError: units own no linear map at all.
        """
        modules = _chosen(model, layout, config.target_modules)
        maps = tuple(_map(name, model.get_submodule(name), config.rank) for name in modules)
        smallest = min(maps, key=lambda item: min(item.num_inputs, item.num_outputs))
        most = min(smallest.num_inputs, smallest.num_outputs)
        if config.rank > most:
            raise ConfigError(
                f"model.lora.rank: found {config.rank}, allowed: 1 to {most}, the smaller side of {smallest.weight}"
            )
        return cls(config, maps)

    def attach(self, model: PreTrainedModel, *, seed: int, weights: Path | None = None) -> None:
        """Freeze the network and put adapters around the chosen maps: A random by the seed, B zero.

        Args:
            model: the network, changed in place.
            seed: seed of A.
            weights: folder of saved adapters to begin with.

        Raises:
            ConfigError: peft is not installed.
            ModelError: the saved adapters cannot be read or belong to another network or config.
        """
        peft = _peft()
        with torch.random.fork_rng():
            peft.inject_adapter_in_model(peft.LoraConfig(**self._settings()), model)
        parameters = dict(model.named_parameters())
        # peft gives adapters the type of the frozen weights, which under ZeRO-3 may be bf16 already; ours stay whole.
        for name, values in (self._fresh(seed) if weights is None else self._read(weights)).items():
            parameters[name].data = values

    def layout(self, layout: UnitLayout) -> UnitLayout:
        """What units own of the adapters."""
        return adapt_layout(layout, self.maps)

    def base_names(self, model: PreTrainedModel) -> dict[str, str]:
        """Name of every weight in the network with adapters -> its name without; adapters themselves are left out."""
        return {name: _plain(name) for name, _ in model.named_parameters() if name not in self._keys()}

    def split(self, weights: Weights) -> tuple[Weights, Weights]:
        """Weights of the network with adapters -> those of the network, by its names without, and the adapters."""
        adapters = {name: weights[name] for name in self._keys()}
        return {_plain(name): weight for name, weight in weights.items() if name not in adapters}, adapters

    def merge(self, weights: Weights, trained: Weights) -> None:
        """Put W0 + (alpha / rank) B A, in float32, in place of each W0 that has an adapter.

        Args:
            weights: of the network without adapters; entries are exchanged, tensors left alone.
            trained: the adapters.
        """
        scale = self.config.alpha / self.config.rank
        for item in self.maps:
            weights[item.weight] = add_low_rank_update(
                weights[item.weight], trained[item.a], trained[item.b], scale, transposed=item.transposed
            ).contiguous()

    def save(self, folder: Path, trained: Weights, base: str | None) -> None:
        """Write adapters as peft does, for `PeftModel.from_pretrained`, into an empty folder."""
        tensors = {key: trained[name].contiguous() for name, key in self._keys().items()}
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        peft_config = _peft().LoraConfig(**self._settings(), base_model_name_or_path=base, inference_mode=True)
        peft_config.save_pretrained(folder)

    def _fresh(self, seed: int) -> Weights:
        """Drawn as by peft: A as the weight of a linear map, B zero."""
        weights: Weights = {}
        generator = torch.Generator().manual_seed(seed)
        for item in self.maps:
            a = torch.empty(item.rank, item.num_inputs)
            weights[item.a] = nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            weights[item.b] = torch.zeros(item.num_outputs, item.rank)
        return weights

    def _read(self, folder: Path) -> Weights:
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
                    f"{folder / CONFIG_FILE}: {key}: found {settings[key]!r}, expected {allowed[0]!r}, as adapters of "
                    "das_ds have it; another scale or form would be trained as if it were plain LoRA"
                )
        found = {key: tuple(values.shape) for key, values in tensors.items()}
        shapes = {name: shape[1:] for item in self.maps for name, shape in item.shapes.items()}
        expected = {key: shapes[name] for name, key in self._keys().items()}
        if found != expected or settings.get("lora_alpha") != self.config.alpha:
            differing = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
            raise ModelError(
                f"{folder}: adapters of another network or config: alpha {settings.get('lora_alpha')}, expected "
                f"{self.config.alpha}; tensors that differ: {', '.join(differing[:3]) or 'none'}"
            )
        return {name: tensors[key] for name, key in self._keys().items()}

    def _keys(self) -> dict[str, str]:
        """Name of a parameter in the network -> its key in peft's file."""
        names = [name for item in self.maps for name in (item.a, item.b)]
        return {name: f"base_model.model.{name.replace('.default.', '.')}" for name in names}

    def _settings(self) -> dict[str, object]:
        return {
            "r": self.config.rank,
            "lora_alpha": self.config.alpha,
            "lora_dropout": self.config.dropout,
            "target_modules": [item.weight.removesuffix(".weight") for item in self.maps],
            "fan_in_fan_out": all(item.transposed for item in self.maps),
        }


def _chosen(model: PreTrainedModel, layout: UnitLayout, targets: list[str]) -> list[str]:
    """Names of the modules to adapt, in the order of the table."""
    owned = dict.fromkeys(item.parameter for item in layout.ownerships)
    names = [name.removesuffix(".weight") for name in owned if name.endswith(".weight")]
    modules = [name for name in names if isinstance(model.get_submodule(name), nn.Linear | Conv1D)]
    experts = [name for name in owned if layout.shapes[name][0] > 1]
    if not modules:
        raise ModelError(f"model.lora: units of {layout.model_type} own no linear map that could be adapted")
    kinds = ", ".join(dict.fromkeys(_kind(name) for name in modules))
    for target in targets:
        if not any(_ends_in(name, target) for name in modules):
            of_experts = f" (the stacked weights of experts take no adapters: {_kind(experts[0])})" if experts else ""
            raise ConfigError(
                f"model.lora.target_modules: found {target}, allowed: {kinds}, or an end of these{of_experts}"
            )
    if experts and not targets:
        logger.warning(
            "model.lora: the stacked weights of experts take no adapters and stay frozen: %s",
            ", ".join(dict.fromkeys(_kind(name) for name in experts)),
        )
    return [name for name in modules if not targets or any(_ends_in(name, target) for target in targets)]


def _plain(name: str) -> str:
    """The name that a weight of an adapted module has without peft."""
    return name.replace(f".{BASE_LAYER}.", ".")


def _kind(name: str) -> str:
    """The name inside its layer."""
    return re.sub(r"^.*?\.\d+\.", "", name)


def _ends_in(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _map(name: str, module: nn.Module, rank: int) -> AdaptedLinear:
    # Not the weight's shape: ZeRO-3 leaves an empty placeholder there.
    if isinstance(module, nn.Linear):
        num_inputs, num_outputs = module.in_features, module.out_features
    else:
        assert isinstance(module, Conv1D), "chosen among linear maps"
        num_inputs, num_outputs = module.nx, module.nf
    return AdaptedLinear(
        weight=f"{name}.weight",
        a=f"{name}.lora_A.default.weight",
        b=f"{name}.lora_B.default.weight",
        rank=rank,
        num_inputs=num_inputs,
        num_outputs=num_outputs,
        transposed=isinstance(module, Conv1D),
    )


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            f"model.lora: needs the package peft, which cannot be imported ({error}); pip install 'das_ds[lora]'"
        ) from error
    return peft
