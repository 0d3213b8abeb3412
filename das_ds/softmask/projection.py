"""Products of vectors and projectors, in place and in bounded memory.

Shape legend: n vectors, d elements of each.
"""

from __future__ import annotations

import torch

from das_ds.functional.projectors import VectorMap

MAX_PRODUCT_ELEMENTS = 1 << 24
"""Elements that are multiplied at once: 64 MiB in float32 for each of the vectors' copy, the product, and the product
in the vectors' own type."""


def num_vectors_at_once(width: int) -> int:
    """Vectors of this width that are multiplied at once."""
    return max(MAX_PRODUCT_ELEMENTS // width, 1)


def project_(vectors: torch.Tensor, projector: VectorMap) -> None:
    """x <- x P for vectors x, (n, d), on the projector's device."""
    for part in vectors.split(num_vectors_at_once(projector.width)):
        part.copy_(projector.project(part))


def project_views(views: list[torch.Tensor], projector: VectorMap, device: torch.device) -> list[torch.Tensor]:
    """x P of the vectors x of all views, (n, d) each, in one product on a device; results lie where the views do."""
    stacked = views[0] if len(views) == 1 else torch.cat(views)
    product = projector.project(stacked.to(device)).to(stacked.device)
    return list(product.split([len(view) for view in views]))
