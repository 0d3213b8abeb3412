"""The continual-learning method."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from das_ds.config.section import Section


class SoftmaskConfig(Section):
    """How important units are protected."""

    apply_to: Literal["update", "gradient"] = "update"
    """`update` scales the optimizer's whole step by 1 - I; `gradient` is the published form, which Adam cancels."""
    readers: bool = False
    """Also protect weights that only read a unit (columns of the second FFN matrix), by the larger importance."""
    shared_scale: float = Field(default=1.0, ge=0.0, le=1.0)
    """Scale of the update of every parameter no unit owns (embeddings, normalisation, LM head); 1 is the paper."""


class ImportanceConfig(Section):
    """How importance is measured."""

    granularity: Literal["unit", "parameter"] = "unit"
    """`unit`: one number per head, neuron and output (DAS); `parameter`: one per weight (SPG), sharded, 1 byte each."""
    normalisation: Literal["abs_tanh", "tanh_positive"] = "abs_tanh"
    """`abs_tanh` = |tanh z| (the paper); `tanh_positive` = tanh(max(z, 0)) protects only what is above the average."""
    samples: int = Field(default=10_000, ge=1)
    """Sequences per importance pass (at most the whole corpus is used)."""
    batch_size: int | None = Field(default=None, ge=1)
    """Sequences per rank and forward pass at unit level; null: `train.micro_batch_size`."""
    initial: str | None = None
    """Accumulated importance file of an earlier run; null: measure general knowledge before the first domain."""


class ContrastConfig(Section):
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
    positions: int = Field(default=32, ge=2, multiple_of=2)
    """Most predicted positions of a sequence whose answer is stored, an even number; only these are rehearsed."""
    replayed: int | None = Field(default=None, ge=1)
    """Sequences replayed with each global batch, on top of it; null: the number nearest to 1 of 16, at least one."""


class KdConfig(Section):
    """Method kd: distillation from the model as it was before the domain."""

    weight: float = Field(default=1.0, ge=0.0)
    """Factor of the divergence of final hidden states from those of the teacher."""
    temperature: float = Field(default=1.0, gt=0.0)
    """What hidden states are divided by before the softmax over the hidden size."""


class ReplayConfig(Section):
    """Earlier text in every global batch, beside any method."""

    share: float | None = Field(default=None, ge=0.0, lt=1.0)
    """Share of each global batch that is text of earlier domains, a whole number of sequences; null: with method
    `replay` the number nearest to 1 of 16, at least one, and none with other methods."""
    general: bool = False
    """Replay the training text of `general` as well, in the first domain too."""


class MethodConfig(Section):
    """The continual-learning method."""

    name: Literal["das", "derpp", "kd", "ncl", "one", "replay"] = "das"
    """`das` soft masks and contrasts, `derpp` replays sequences with earlier answers from a buffer, `kd` distils from
    the model before the domain, `ncl` is naive continual training, `one` trains each domain from the base, `replay` is
    naive with earlier text in every batch."""
    view_dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Dropout at the units where views are made (contrast, general knowledge), for networks without dropout."""
    softmask: SoftmaskConfig = SoftmaskConfig()
    importance: ImportanceConfig = ImportanceConfig()
    contrast: ContrastConfig = ContrastConfig()
    derpp: DerppConfig = DerppConfig()
    kd: KdConfig = KdConfig()
    replay: ReplayConfig = ReplayConfig()

    @model_validator(mode="after")
    def _mask_fits_granularity(self) -> MethodConfig:
        if self.importance.granularity == "parameter" and (self.softmask.readers or self.softmask.shared_scale != 1.0):
            raise ValueError(
                f"softmask.readers and softmask.shared_scale need importance.granularity: unit, found "
                f"readers: {self.softmask.readers}, shared_scale: {self.softmask.shared_scale} with parameter, where "
                "every weight has its own importance; allowed there: readers: false, shared_scale: 1.0"
            )
        return self
