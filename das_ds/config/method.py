"""The continual-learning method."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from das_ds.config.section import PathText, Section

DEFAULT_MERGING = 0.5
"""c of method `merge`."""
ImportanceScore = Literal["abs_grad", "squared_grad", "grad_x_weight"]


class SoftmaskConfig(Section):
    """How important units are protected."""

    apply_to: Literal["update", "gradient"] = "update"
    """`update` scales the optimizer's whole step by 1 - I; `gradient` is the published form, which Adam cancels."""
    groups: list[Literal["head", "intermediate", "output", "unowned"]] | None = None
    """Whose weights are masked by their importance; null: all (only `head` with method dga). `unowned` stands
    for what no unit owns, which has importance at parameter level only."""
    include_consumers: bool = False
    """Also protect weights that only read a unit (columns of the second FFN matrix), by the larger importance."""
    unowned_update_scale: float = Field(default=1.0, ge=0.0, le=1.0)
    """Scale of the update of every parameter no unit owns (embeddings, normalisation, LM head), at parameter level on
    top of its mask; 1 is the paper."""
    exponent: float = Field(default=1.0, gt=0.0)
    """p of the mask (1 - I)^p; above 1 protects more, below 1 less, and what has importance 0 or 1 stays as it is."""


class ImportanceConfig(Section):
    """How importance is measured."""

    score: ImportanceScore = "abs_grad"
    """What is summed over gradients g: `abs_grad` |g|; `squared_grad` g^2, the diagonal of the empirical Fisher matrix;
    `grad_x_weight` |g * weight|, at parameter level only."""
    granularity: Literal["unit", "parameter", "direction"] = "unit"
    """`unit`: one number per head, neuron and output (DAS); `parameter`: one per weight (SPG), sharded, 1 byte each;
    `direction`: one per principal direction of what flows into a linear layer, with `normalization: saturating`."""
    normalization: Literal["abs_tanh", "tanh_positive", "rank_hard", "rank_soft", "saturating"] = "abs_tanh"
    """`abs_tanh` = |tanh z| (the paper); `tanh_positive` = tanh(max(z, 0)) protects only what is above the average;
    `rank_hard` = 1 for the most important `protected_fraction`, else 0; `rank_soft` = a power of the rank whose mean is
    `protected_fraction`; `saturating` = a / (a + `half_saturation` * mean a)."""
    protected_fraction: float = Field(default=0.5, gt=0.0, lt=1.0)
    """Share of what is compared that one domain protects: wholly (`rank_hard`) or on average (`rank_soft`)."""
    half_saturation: float = Field(default=1.0, gt=0.0)
    """c of `saturating`: what is c times as important as the average gets 1/2."""
    scope: Literal["tensor", "group", "model"] = "tensor"
    """What importance is compared with: `tensor`, the same layer and unit group or the same parameter (the paper);
    `group`, the same unit group in all layers (at parameter level all that no unit owns is one group too); `model`."""
    num_samples: int = Field(default=10_000, ge=1)
    """Sequences per importance pass (at most the whole corpus is used)."""
    batch_size: int | None = Field(default=None, ge=1)
    """Sequences per rank and forward pass at unit level; null: `train.micro_batch_size`."""
    gradient_batch_size: int | None = Field(default=None, ge=1)
    """Sequences per gradient at parameter level and for `ewc`, a multiple of the ranks; fewer tell single sequences
    apart better and take longer; null: `train.global_batch_size`."""
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


class ContrastiveConfig(Section):
    """The contrastive loss that integrates old and new knowledge."""

    weight: float = Field(default=1.0, ge=0.0)
    """Factor of the contrastive loss; 0 leaves it (and its three extra views) out."""
    temperature: float = Field(default=0.05, gt=0.0)
    """Temperature of the cosine similarities."""
    pooling: Literal["auto", "mean", "last"] = "auto"
    """One vector per sequence: the mean over its tokens or its last token (of each isolated document); `auto` is mean
    for masked and last for causal models."""


class DerppConfig(Section):
    """Method derpp: replay from a buffer, with the answers that the model gave when it stored a sequence."""

    alpha: float = Field(default=0.5, ge=0.0)
    """Factor of the distance of final hidden states from the stored ones."""
    beta: float = Field(default=0.5, ge=0.0)
    """Factor of the pre-training loss on replayed sequences."""
    capacity: int = Field(default=1000, ge=1)
    """Sequences in the buffer, over all ranks; each takes 4 bytes a token and 8 + 2 x hidden size an answer."""
    max_positions: int = Field(default=32, ge=2, multiple_of=2)
    """Most predicted positions of a sequence whose answer is stored, an even number; only these are rehearsed."""
    batch_size: int | None = Field(default=None, ge=1)
    """Sequences replayed with each global batch, on top of it; null: the number nearest to 1 of 16, at least one."""


class EwcConfig(Section):
    """Elastic weight consolidation."""

    lambda_: float = Field(default=10.0, ge=0.0, alias="lambda")
    """Factor lambda of the penalty lambda / 2 * sum_i F_i (theta_i - theta*_i)^2, F being that of single sequences."""
    decay: float = Field(default=1.0, ge=0.0, le=1.0)
    """Factor of the Fisher information of all earlier domains when a domain's is added; 1 forgets none."""


class KdConfig(Section):
    """Method kd: distillation from the model as it was before the domain."""

    weight: float = Field(default=1.0, ge=0.0)
    """Factor of the divergence of final hidden states from those of the teacher."""
    temperature: float = Field(default=1.0, gt=0.0)
    """What hidden states are divided by before the softmax over the hidden size."""


class MergeConfig(Section):
    """Averaging of the weights before and after each domain, with any method."""

    weight: Annotated[float, Field(ge=0.0, lt=1.0)] | Literal["average"] | None = None
    """Share of the model from before the domain, the rest being what training made of it; `average` is t / (t + 1)
    after domain t = 1, 2, ..., so that the base model and all models so far weigh the same; null: 0.5 with method
    `merge`, and none with other methods."""


class ReplayConfig(Section):
    """Earlier text in every global batch, beside any method."""

    fraction: float | None = Field(default=None, ge=0.0, lt=1.0)
    """Share of each global batch that is text of earlier domains, a whole number of sequences; null: with method
    `replay` the number nearest to 1 of 16, at least one, and none with other methods."""
    general: bool = False
    """Replay the training text of `general` as well, in the first domain too."""


class MethodConfig(Section):
    """The continual-learning method."""

    name: Literal["das", "derpp", "dga", "ewc", "kd", "merge", "ncl", "one", "pool", "replay"] = "das"
    """`das` soft masks and contrasts, `derpp` replays sequences with earlier answers from a buffer, `dga` is das with
    general knowledge alone, `ewc` pulls weights back by their Fisher information, `kd` distils from the model before
    the domain, `merge` averages weights from before and after each domain, `ncl` is naive continual training, `one`
    trains each domain from the base, `pool` on all domains at once, `replay` is naive with earlier text in every
    batch."""
    view_dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Dropout at the units where views are made (contrast, general knowledge), for networks without dropout."""
    softmask: SoftmaskConfig = SoftmaskConfig()
    importance: ImportanceConfig = ImportanceConfig()
    contrastive: ContrastiveConfig = ContrastiveConfig()
    derpp: DerppConfig = DerppConfig()
    ewc: EwcConfig = EwcConfig()
    kd: KdConfig = KdConfig()
    merge: MergeConfig = MergeConfig()
    replay: ReplayConfig = ReplayConfig()

    @property
    def is_soft_masked(self) -> bool:
        """Whether the method measures importance of units or weights, protects by it, and contrasts."""
        return self.name in ("das", "dga") and self.importance.granularity != "direction"

    @property
    def merging(self) -> float | Literal["average"] | None:
        """c by which weights are merged after each domain; None: they are not."""
        if self.merge.weight is None:
            return DEFAULT_MERGING if self.name == "merge" else None
        return self.merge.weight

    @property
    def masks_directions(self) -> bool:
        """Whether the method protects directions of what flows into linear layers."""
        return self.name == "das" and self.importance.granularity == "direction"

    @property
    def has_own_mask(self) -> bool:
        """Whether what masks single weights is something else than their importance, and takes memory of its own."""
        mask = self.softmask
        is_plain = self.name != "dga" and mask.groups is None and mask.exponent == mask.unowned_update_scale == 1.0
        return self.is_soft_masked and self.importance.granularity == "parameter" and not is_plain

    @model_validator(mode="after")
    def _mask_fits_granularity(self) -> MethodConfig:
        if self.importance.granularity == "parameter" and self.softmask.include_consumers:
            raise ValueError(
                "softmask.include_consumers needs importance.granularity: unit, found true with parameter, where every "
                "weight has its own importance; allowed there: false"
            )
        return self

    @model_validator(mode="after")
    def _settings_fit_directions(self) -> MethodConfig:
        """What directions have no use for must not be asked for; `dga` has no general knowledge of them."""
        if self.importance.granularity != "direction" or self.name not in ("das", "dga"):
            return self
        found: dict[str, tuple[object, object]] = {
            "name": (self.name, "das"),
            "importance.normalization": (self.importance.normalization, "saturating"),
            "contrastive.weight": (self.contrastive.weight, 0.0),
        }
        found |= {
            f"softmask.{key}": (getattr(self.softmask, key), field.default)
            for key, field in SoftmaskConfig.model_fields.items()
        }
        found |= {
            f"importance.{key}": (getattr(self.importance, key), ImportanceConfig.model_fields[key].default)
            for key in ("score", "scope")
        }
        for key, (value, allowed) in found.items():
            if value != allowed:
                raise ValueError(
                    f"{key}: found {value} with importance.granularity direction, allowed there: {allowed}"
                )
        return self
