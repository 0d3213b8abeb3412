"""Training: optimization and held-out evaluation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from das_ds.config.section import Section

LRSchedulerName = Literal["linear", "cosine", "constant_with_warmup", "wsd", "infinite"]


class TrainConfig(Section):
    """Optimization; a domain may have its own length, learning rate and schedule (`domains`)."""

    steps_per_domain: int = Field(default=2500, ge=1)
    """Optimizer steps of every domain without a length of its own; joint training takes as many as all domains
    together."""
    global_batch_size: int = Field(default=256, ge=1)
    """Sequences per optimizer step over all ranks and accumulation steps."""
    micro_batch_size: int = Field(default=32, ge=1)
    """Sequences per rank and forward pass."""
    optimizer: Literal["adamw", "cpu_adam", "lion"] = "adamw"
    """`adamw` steps and masks in one pass; `cpu_adam` (DeepSpeed's, for offload) and `lion` take a full step, which the
    mask then interpolates back toward the old weights."""
    learning_rate: float = Field(default=1e-4, gt=0.0)
    """Peak learning rate."""
    layer_lr_decay: float = Field(default=1.0, gt=0.0, le=1.0)
    """Layer-wise learning-rate decay: ratio of the rate of each layer to that of the layer above it; the LM head has
    the full rate, embeddings the lowest; 1: one rate for all."""
    lr_scheduler: LRSchedulerName = "linear"
    """Learning-rate schedule, restarted for each domain; `wsd`: warm-up, stable, decay; `infinite`: one such schedule
    across all domains, with warm-up in the first and decay in the last."""
    warmup_ratio: float = Field(default=0.06, ge=0.0, lt=1.0)
    """Fraction of a domain's steps over which the learning rate rises from 0."""
    decay_ratio: float = Field(default=0.2, ge=0.0, le=1.0)
    """Fraction of a domain's steps, at its end, over which the learning rate falls in `wsd` and `infinite`."""
    min_lr_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    """Learning rate at the end of a schedule that falls, as a fraction of the peak."""
    reset_optimizer: bool = True
    """Start every domain with zero moments; false: those of the domain before, and in fp16 its loss scale, are kept."""
    weight_decay: float = Field(default=0.01, ge=0.0)
    """Decoupled weight decay; biases and normalization layers are not decayed."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the optimizer's moments."""
    eps: float = Field(default=1e-8, gt=0.0)
    """AdamW's denominator offset."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Type of weights and activations; the optimizer always keeps fp32. `fp16` scales the loss (ZeRO 1-3)."""
    matmul_precision: Literal["highest", "high"] = "highest"
    """`torch.set_float32_matmul_precision`: `high` lets float32 matrix products on GPUs use TF32 (10 bits of mantissa),
    5 to 10 times faster; also in `evaluate` and `finetune`."""
    max_grad_norm: float = Field(default=1.0, ge=0.0)
    """Gradients are clipped to this norm; 0 disables clipping."""
    max_logits_mib: int = Field(default=256, ge=1)
    """Largest chunk of float32 logits in MiB; larger batches are split, and each chunk is recomputed in the backward
    pass."""
    log_interval: int = Field(default=10, ge=1)
    """Optimizer steps between two lines of metrics.jsonl."""
    log_group_norms: bool = False
    """Whether these lines also have the gradient norms of attention, MLPs, embeddings, normalization and the rest
    (`grad_norm/attention`, ...)."""

    @model_validator(mode="after")
    def _valid_betas(self) -> TrainConfig:
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), found {list(self.betas)}")
        return self

    @model_validator(mode="after")
    def _ratios_fit(self) -> TrainConfig:
        if self.lr_scheduler in ("wsd", "infinite") and self.warmup_ratio + self.decay_ratio > 1.0:
            raise ValueError(
                f"warmup_ratio + decay_ratio: found {self.warmup_ratio:g} + {self.decay_ratio:g} with lr_scheduler "
                f"{self.lr_scheduler}, allowed: at most 1 together"
            )
        return self


class EarlyStoppingConfig(Section):
    """Ends the training of a domain when its own held-out loss no longer falls."""

    patience: int = Field(default=3, ge=1)
    """Evaluations in a row without an improvement after which the domain ends."""
    min_delta: float = Field(default=0.0, ge=0.0)
    """Nats per predicted token by which the lowest loss so far has to fall for an improvement."""


class EvaluationConfig(Section):
    """Held-out evaluation before training and after each domain, and within domains if `every_steps` is given."""

    batch_size: int | None = Field(default=None, ge=1)
    """Sequences per rank and forward pass; null: `train.micro_batch_size`."""
    max_sequences: int | None = Field(default=None, ge=1)
    """Maximum number of held-out sequences per corpus; null: all."""
    every_steps: int | None = Field(default=None, ge=1)
    """Steps of a domain between two evaluations of the domain itself, all earlier ones and the general corpus; also
    after its last step; null: none within a domain."""
    keep_best: bool = False
    """Export two models of a domain: the last, and that of the step with the lowest held-out loss of the domain itself;
    `model/` is the one that `continue_from` names, `best/` or `last/` the other."""
    continue_from: Literal["last", "best"] = "last"
    """Model of a domain that the next one continues from."""
    early_stopping: EarlyStoppingConfig | None = None
    """Early stopping; null: every domain takes all of its steps."""

    base_divergence: bool = False
    """Measure KL(base || model) on the held-out text of each domain after learning it, the base being the model before
    the first domain: a predictor of forgetting that needs no other text. Keeps the base weights in host memory."""

    @model_validator(mode="after")
    def _needs_evaluations(self) -> EvaluationConfig:
        if self.every_steps is None and (self.keep_best or self.continue_from == "best" or self.early_stopping):
            key = "early_stopping" if self.early_stopping else "keep_best" if self.keep_best else "continue_from"
            raise ValueError(f"{key}: needs evaluations within domains, expected every_steps")
        return self

    @property
    def selects_best(self) -> bool:
        """Whether the best model of a domain is kept."""
        return self.keep_best or self.continue_from == "best"
