"""Which network is trained."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from das_ds.config.architecture import ArchitectureConfig
from das_ds.config.section import PathText, Section


class LoraConfig(Section):
    """Low-rank adapters, W = W0 + (alpha / rank) B A; needs peft."""

    rank: int = Field(default=8, ge=1)
    """Rank r of the update of each linear map; at most the smaller side of the smallest one."""
    alpha: float = Field(default=16.0, gt=0.0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on what enters the adapters."""
    target_modules: list[str] = Field(default=[])
    """Modules by the end of their name, such as query or attention.output.dense; empty: all that units own."""
    init_from: PathText | None = None
    """Adapter folder of an earlier run over the same network to begin with; null: a fresh adapter."""


class ModelConfig(Section):
    """Which network is trained; exactly one of `name_or_path` and `config` is given."""

    name_or_path: PathText | None = None
    """Folder or hub name of pre-trained weights."""
    revision: str | None = None
    """Branch, tag or commit of a model of the hub; null: its default branch. The commit is recorded at the first start
    and used again when the run continues."""
    config: dict[str, Any] | None = None
    """Hugging Face model config (with `model_type`) for a network with random weights."""
    allow_missing: list[Literal["lm_head"]] = Field(default=[])
    """Weights that may be absent from the files, drawn by `seed` then: lm_head, all behind the base model."""
    head_warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps that train an LM head drawn under `allow_missing` alone, before the first evaluation, on batches
    of the first domain (which begins with the same ones again); all other weights stay as they are."""
    head_warmup_learning_rate: float = Field(default=1e-3, gt=0.0)
    """Peak of these steps, whose schedule, batch size and optimizer are those of `train`."""
    objective: Literal["auto", "mlm", "clm"] = "auto"
    """Pre-training loss: masked or causal language modelling; `auto` is what the architecture is pre-trained with."""
    attention: str = "sdpa"
    """Attention implementation of the network, one that transformers knows, such as sdpa, eager, flash_attention_2."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lora: LoraConfig | None = None
    """Train low-rank adapters of linear maps in place of the weights themselves; null: train the weights."""
    architecture: ArchitectureConfig | None = None
    """Your own table of units for this model; null: the registered one. `das-ds inspect MODEL --yaml` proposes one."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.name_or_path is None) == (self.config is None):
            raise ValueError("give exactly one of name_or_path (pre-trained weights) and config (random weights)")
        if self.config is not None and self.revision is not None:
            raise ValueError("revision is of a model of the hub (name_or_path), found it with config")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("config needs model_type, for example model_type: roberta")
        if self.allow_missing and self.name_or_path is None:
            raise ValueError("allow_missing: found lm_head with random weights, of which none is missing; allowed: []")
        if self.head_warmup_steps and not self.allow_missing:
            raise ValueError(
                f"head_warmup_steps: found {self.head_warmup_steps} without allow_missing: [lm_head], expected both: a "
                "head that the files hold is trained already"
            )
        if self.head_warmup_steps and self.lora is not None:
            raise ValueError(
                f"head_warmup_steps: found {self.head_warmup_steps} with lora, under which the head is frozen; "
                "train the head in a run without lora and start from the model that it exports"
            )
        return self
