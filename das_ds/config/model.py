"""Model: the network that is trained, its head, and LoRA."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from das_ds.config.architecture import ArchitectureConfig
from das_ds.config.section import PathText, Section


class LoraConfig(Section):
    """LoRA: low-rank adapters, W = W0 + (alpha / rank) B A; needs peft."""

    rank: int = Field(default=8, ge=1)
    """Rank r of the update of each linear layer; at most the smaller side of the smallest one."""
    alpha: float = Field(default=16.0, gt=0.0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the input of the adapters."""
    target_modules: list[str] = Field(default=[])
    """Modules by the end of their name, such as query or attention.output.dense; empty: all linear layers that units
    own."""
    init_from: PathText | None = None
    """Adapter folder of an earlier run of the same network; null: a new adapter."""


class ModelConfig(Section):
    """The network; give exactly one of `name_or_path` and `config`."""

    name_or_path: PathText | None = None
    """Folder or hub name of pre-trained weights."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; null: its default branch. The commit is recorded at the first start and
    reused when the run resumes."""
    config: dict[str, Any] | None = None
    """Hugging Face model config (with `model_type`) of a network with random weights."""
    allow_missing: list[Literal["lm_head"]] = Field(default=[])
    """Weights that may be missing from the files and are then initialized from `seed`: lm_head, everything after the
    base model."""
    head_warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps that train a newly initialized LM head (`allow_missing`) with all other weights frozen, before
    the first evaluation, on batches of the first domain, which then starts over."""
    head_warmup_learning_rate: float = Field(default=1e-3, gt=0.0)
    """Peak learning rate of these steps; schedule, batch size and optimizer are those of `train`."""
    objective: Literal["auto", "mlm", "clm"] = "auto"
    """Pre-training loss: masked or causal language modeling; `auto` is the objective of the architecture."""
    attention: str = "sdpa"
    """Attention implementation of transformers, such as sdpa, eager or flash_attention_2."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about one third more time."""
    lora: LoraConfig | None = None
    """Train low-rank adapters of linear layers instead of the weights; null: train the weights."""
    architecture: ArchitectureConfig | None = None
    """Custom table of units for this model, as proposed by `das-ds inspect MODEL --yaml`; null: the registered one."""

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
                "head in the files is already trained"
            )
        if self.head_warmup_steps and self.lora is not None:
            raise ValueError(
                f"head_warmup_steps: found {self.head_warmup_steps} with lora, under which the head is frozen; "
                "train the head in a run without lora and start from the exported model"
            )
        return self
