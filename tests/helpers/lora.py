"""Networks with random adapters, and the same networks written without peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from das_ds.config import LoraConfig
from das_ds.models.architectures.spec import ArchitectureSpec
from das_ds.models.lora import Lora


def random_weights(lora: Lora, seed: int = 0) -> dict[str, Tensor]:
    """A and B of every map; no zero anywhere, so that no gradient is zero for that reason."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: shape[1:] for item in lora.linears for name, shape in item.shapes.items()}
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def adapted(
    model: PreTrainedModel, spec: ArchitectureSpec, config: LoraConfig, folder: Path
) -> tuple[Lora, dict[str, Tensor]]:
    """The model with random adapters attached, which are also saved to `folder`."""
    lora = Lora.plan(model, spec.layout(model), config)
    weights = random_weights(lora)
    folder.mkdir(exist_ok=True)
    lora.save(folder, weights, None)
    lora.attach(model, seed=0, weights=folder)
    return lora, weights


class WrittenOut(nn.Module):
    """y = (W0 + s B A) x + b with W0 and b fixed; parameters are called as peft calls them."""

    def __init__(self, linear: nn.Linear, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach())
        self.register_buffer("bias", linear.bias.detach())
        self.lora_A = nn.ModuleDict({"default": _Matrix(a)})
        self.lora_B = nn.ModuleDict({"default": _Matrix(b)})
        self._scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        a = self.lora_A["default"].weight
        b = self.lora_B["default"].weight
        return nn.functional.linear(x, self.weight + self._scale * (b @ a), self.bias)  # type: ignore[operator]


class _Matrix(nn.Module):
    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values.clone())


def to_dense(model: PreTrainedModel, lora: Lora, weights: dict[str, Tensor]) -> PreTrainedModel:
    """The model, whose only parameters are now A and B of its written-out adapters."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                del module._parameters[name]
                module.register_buffer(name, parameter.detach())
    scale = lora.config.alpha / lora.config.rank
    for item in lora.linears:
        name = item.weight.removesuffix(".weight")
        model.set_submodule(name, WrittenOut(model.get_submodule(name), weights[item.a], weights[item.b], scale))  # type: ignore[arg-type]
    return model


def explicit_scales(
    weights: dict[str, Tensor],
    importance: dict[str, Tensor],
    *,
    include_consumers: bool = False,
    unowned_update_scale: float = 1.0,
) -> dict[str, Tensor]:
    """1 - I of every element of A and B of a network of the BERT kind."""
    scales = {name: torch.full_like(values, unowned_update_scale) for name, values in weights.items()}
    num_layers, num_heads = importance["head"].shape

    def rows(name: str, unit_importance: Tensor) -> None:
        values = scales[f"{name}.lora_B.default.weight"]
        values[:] = (1 - unit_importance)[:, None]

    def columns(name: str, unit_importance: Tensor) -> None:
        values = scales[f"{name}.lora_A.default.weight"]
        values[:] = (1 - unit_importance)[None, :]

    for layer in range(num_layers):
        prefix = f"roberta.encoder.layer.{layer}"
        width = len(importance["output"][layer]) // num_heads
        head = importance["head"][layer].repeat_interleave(width)
        for kind in ("query", "key", "value"):
            rows(f"{prefix}.attention.self.{kind}", head)
        columns(f"{prefix}.attention.output.dense", head)
        rows(f"{prefix}.intermediate.dense", importance["intermediate"][layer])
        rows(f"{prefix}.output.dense", importance["output"][layer])
        if include_consumers:
            columns(f"{prefix}.output.dense", importance["intermediate"][layer])
    return scales


def to_double(scales: dict[str, Tensor]) -> dict[str, Any]:
    """For the float64 reference."""
    return {name: values.double() for name, values in scales.items()}
