"""DAS: soft masking and contrast (Ke et al., Continual Pre-training of Language Models, ICLR 2023)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from das_ds.config import RunConfig
from das_ds.methods.soft_masked import SoftMasked, SoftMaskedConfig
from das_ds.models.size import MeasuredSequences, ModelSize
from das_ds.run_dir import IMPORTANCE_FILE

if TYPE_CHECKING:
    from das_ds.context import DomainContext


class DasConfig(SoftMaskedConfig):
    """DAS: soft masks by importance for general knowledge and all earlier domains, and a contrastive loss."""

    name: Literal["das"] = "das"


class DAS(SoftMasked[DasConfig]):
    """Protects units or weights that matter to general knowledge and earlier domains, and contrasts with both.

    Keeps (heads + intermediate + hidden) numbers per layer, or, at parameter level, one byte per weight divided over
    the ranks. Extra compute: three more rows per sequence in the packed forward pass, and one forward and backward
    pass over `importance.num_samples` sequences per domain.
    """

    Config = DasConfig

    @classmethod
    def measured_sequences(cls, config: RunConfig, size: ModelSize, num_ranks: int) -> MeasuredSequences:
        """The sample after each domain too."""
        general = super().measured_sequences(config, size, num_ranks)
        return replace(general, after=cls.settings_in(config).importance.num_samples)

    def after_domain(self, domain: DomainContext) -> None:
        """Importance of the domain just learned, and EMax with all before."""
        from das_ds.softmask.measure import PRETRAINING

        latest = self.measure(domain, f"importance of {domain.name}", PRETRAINING)
        accumulated = self.accumulate(latest)
        self.write(domain, {domain.folder / IMPORTANCE_FILE: latest, domain.run_folder / IMPORTANCE_FILE: accumulated})
