"""DGA: only general knowledge is masked and contrasted (Ke et al., EMNLP 2022, arXiv 2301.08986)."""

from __future__ import annotations

from typing import Literal

import torch

from das_ds.functional.units import HEAD, UnitValues
from das_ds.methods.soft_masked import SoftMasked, SoftMaskedConfig


class DgaConfig(SoftMaskedConfig):
    """DGA: das that protects general knowledge only, and masks attention heads only by default."""

    name: Literal["dga"] = "dga"


class DGA(SoftMasked[DgaConfig]):
    """Soft masks attention heads by their importance to general knowledge, and contrasts full with general knowledge.

    From Ke et al., Adapting a Language Model While Preserving its General Knowledge, EMNLP 2022, which adapts to one
    domain. It differs from DAS, which grew out of it, in two things: no domain's own importance is measured, so that
    all domains are learned under the mask of general knowledge, and of the three groups of units only heads are
    masked (`softmask.groups` chooses others) and gated in the contrasted view, o^gen. Importance and contrast are
    computed as in DAS. The published mask scales the gradient, which is `softmask.apply_to: gradient`.

    Memory as for `das`. Extra compute: three more rows per sequence in the packed forward pass, and one forward and
    backward pass over `importance.num_samples` sequences before the first domain.
    """

    Config = DgaConfig
    default_groups = (HEAD,)

    def gates(self) -> UnitValues:
        """Importance of heads; all else passes unchanged."""
        return {
            group: values if group == HEAD else torch.ones_like(values) for group, values in super().gates().items()
        }

    def accumulated_importance(self) -> UnitValues | None:
        """Importance of heads."""
        by_unit = super().accumulated_importance()
        return None if by_unit is None else {HEAD: by_unit[HEAD]}
