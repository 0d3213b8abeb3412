"""Groups of parameters whose gradient norms are logged."""

from __future__ import annotations

from das_ds.functional.units import HEAD, INTERMEDIATE, UnitLayout
from das_ds.models.lora import Lora

ATTENTION = "attention"
MLP = "mlp"
EMBEDDINGS = "embeddings"
NORMALIZATION = "normalization"
OTHER = "other"


def gradient_groups(layout: UnitLayout, lora: Lora | None = None) -> dict[str, str]:
    """Trained parameter -> its group.

    Attention and MLP are what attention heads and neurons own rows or columns of, biases included; adapters are in the
    group of the weight that they adapt. Embeddings have one row per token, an LM head of its own too. Other vectors are
    normalization (and biases of the residual stream), other matrices `other`: positions, routers, an LM head's
    transform.

    Args:
        layout: of the network that is trained.
        lora: its adapters.
    """
    owned: dict[str, set[str]] = {}
    for item in layout.ownerships if layout.adapted is None else layout.adapted:
        owned.setdefault(item.parameter, set()).add(item.group)
    linears = () if lora is None else lora.linears
    adapted = {name: linear.weight for linear in linears for name in (linear.a, linear.b)}
    return {name: _group(name, owned.get(adapted.get(name, name), set()), layout) for name in layout.shapes}


def _group(name: str, owners: set[str], layout: UnitLayout) -> str:
    if HEAD in owners:
        return ATTENTION
    if INTERMEDIATE in owners:
        return MLP
    if name in layout.vocabulary:
        return EMBEDDINGS
    return NORMALIZATION if layout.shapes[name][2] == 1 else OTHER
