"""Importance and soft masks: settings that the methods of that kind share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from das_ds.config.section import PathText, Section

MaskTarget = Literal["update", "first_moment", "gradient"]
ImportanceScore = Literal["abs_grad", "squared_grad", "grad_x_weight"]


class SoftmaskConfig(Section):
    """How important units or weights are protected."""

    apply_to: MaskTarget = "update"
    """`update` scales the optimizer's step by 1 - I; `first_moment` scales what enters Adam's first moment, and not
    weight decay (Hu et al., 2026); `gradient` is the published form, which Adam cancels."""
    groups: list[Literal["head", "intermediate", "output", "unowned"]] | None = None
    """Groups whose weights are masked by their importance; null: the method's default. `unowned`, the weights that
    belong to no unit, have importance at parameter level only."""
    include_consumers: bool = False
    """Also protect weights that only read a unit (columns of the second FFN matrix), by the larger importance."""
    unowned_update_scale: float = Field(default=1.0, ge=0.0, le=1.0)
    """Scale of the update of every parameter that no unit owns (embeddings, normalization, LM head), at parameter level
    on top of its mask; 1 is the paper."""
    exponent: float = Field(default=1.0, gt=0.0)
    """p of the mask (1 - I)^p; above 1 protects more, below 1 less. Importance 0 and 1 are unaffected."""


class ImportanceConfig(Section):
    """How importance is measured."""

    score: ImportanceScore = "abs_grad"
    """Score that is summed over gradients g: `abs_grad` |g|; `squared_grad` g^2, the diagonal of the empirical Fisher
    matrix; `grad_x_weight` |g * weight|, at parameter level only."""
    granularity: str = "unit"
    """The objects whose importance is measured: `unit`, every head, neuron and output (DAS); `parameter`, every weight
    (SPG), sharded, 1 byte each."""
    normalization: Literal["abs_tanh", "tanh_positive", "rank_hard", "rank_soft", "saturating"] = "abs_tanh"
    """`abs_tanh` = |tanh z| (the paper); `tanh_positive` = tanh(max(z, 0)) protects only entries above the average;
    `rank_hard` = 1 for the most important `protected_fraction`, else 0; `rank_soft` = a power of the rank whose mean is
    `protected_fraction`; `saturating` = a / (a + `half_saturation` * mean a)."""
    protected_fraction: float = Field(default=0.5, gt=0.0, lt=1.0)
    """Fraction that one domain protects: completely (`rank_hard`) or on average (`rank_soft`)."""
    half_saturation: float = Field(default=1.0, gt=0.0)
    """c of `saturating`: c times the average importance gives 1/2."""
    scope: Literal["tensor", "group", "model"] = "tensor"
    """Set within which importance is compared: `tensor`, the same layer and unit group or the same parameter (the
    paper); `group`, the same unit group in all layers (at parameter level the unowned weights are a group, too);
    `model`."""
    num_samples: int = Field(default=10_000, ge=1)
    """Sequences per importance pass (at most the complete corpus is used)."""
    batch_size: int | None = Field(default=None, ge=1)
    """Sequences per rank and forward pass at unit level; null: `train.micro_batch_size`."""
    gradient_batch_size: int | None = Field(default=None, ge=1)
    """Sequences per gradient at parameter level, a multiple of the ranks; fewer distinguish single sequences better and
    take longer; null: `train.global_batch_size`."""
    init_from: PathText | None = None
    """Accumulated importance file of an earlier run; null: measure general knowledge before the first domain."""

    @model_validator(mode="after")
    def _score_fits_granularity(self) -> ImportanceConfig:
        if self.score == "grad_x_weight" and self.granularity == "unit":
            raise ValueError(
                "score: found grad_x_weight with granularity unit, where it equals abs_grad, since every gate is 1; "
                "allowed there: abs_grad, squared_grad"
            )
        return self
