"""Freezing: naive training of the upper part of a network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from das_ds.config import FrozenPart, MethodConfig, RunConfig
from das_ds.errors import ConfigError
from das_ds.methods.base import Method

if TYPE_CHECKING:
    from das_ds.config.deepspeed import EngineConfig


class FreezeConfig(MethodConfig):
    """Naive training of all but the embeddings and the first layers, which keep the weights of the base model."""

    name: Literal["freeze"] = "freeze"
    embeddings: bool = True
    """Freeze the embeddings, and with them an LM head that is tied to them."""
    num_layers: int = Field(default=0, ge=0)
    """Layers that are frozen, from the first one on."""

    @property
    def frozen_part(self) -> FrozenPart:
        """Embeddings and first layers."""
        return FrozenPart(self.embeddings, self.num_layers)

    @model_validator(mode="after")
    def _freezes_something(self) -> FreezeConfig:
        if not self.embeddings and self.num_layers == 0:
            raise ValueError("num_layers: found 0 with embeddings: false, expected at least 1, or method ncl")
        return self


class Freeze(Method[FreezeConfig]):
    """Embeddings and the first n layers are not trained, in any domain: theta_i = theta_i of the base model.

    The strategy `Freeze` of Zheng et al., *Spurious Forgetting in Continual Learning of Language Models* (ICLR 2025,
    arXiv 2501.13453), which freezes the bottom layers. Frozen weights require no gradient, so that DeepSpeed keeps
    neither fp32 copies nor gradients nor moments of them, and there is no backward pass below the first trained layer.

    Keeps nothing in memory; a step needs less memory and compute than naive training.
    """

    Config = FreezeConfig

    @classmethod
    def validate(cls, config: RunConfig, engine_config: EngineConfig) -> None:
        """LoRA freezes the network itself, and new tokens have to be learned."""
        if config.model.lora is not None:
            raise ConfigError(
                "method.name: found freeze with model.lora, under which the network is frozen already; choose layers "
                "by model.lora.target_modules"
            )
        if config.data.add_tokens and cls.settings_in(config).embeddings:
            raise ConfigError(
                "method.embeddings: found true with data.add_tokens, whose tokens would never be learned; allowed: "
                "false"
            )
