"""The variants that are compared; to add one, add a line."""

from __future__ import annotations

from typing import Any

from benchmarks.domains.plan import NAIVE, Variant, merged

NO_CONTRAST = {"contrast": {"weight": 0.0}}
ONE_SIDED = {"importance": {"normalisation": "tanh_positive"}}
PARAMETER = {"importance": {"granularity": "parameter", "normalisation": "tanh_positive"}}
REPLAY: dict[str, Any] = {"replay": {"share": 0.0625}}
"""1 of 16 sequences, the nearest to 5 % that a batch of 16 can hold."""


def das(label: str, *sections: dict[str, Any]) -> Variant:
    """das with keys of the section `method`."""
    return Variant(label, {"method": merged({"name": "das"}, *sections)})


VARIANTS = (
    Variant(NAIVE, {"method": {"name": "ncl"}}),
    Variant("one", {"method": {"name": "one"}}),
    Variant("pool", {"method": {"name": "pool"}}),
    Variant("replay", {"method": {"name": "replay", **REPLAY}}),
    Variant("derpp", {"method": {"name": "derpp"}}),
    Variant("ewc", {"method": {"name": "ewc"}}),
    Variant("kd", {"method": {"name": "kd"}}),
    Variant("merge", {"method": {"name": "merge"}}),
    Variant("dga", {"method": {"name": "dga"}}),
    das("das published", {"softmask": {"apply_to": "gradient"}}),
    das("das"),
    das("das one-sided", ONE_SIDED, NO_CONTRAST),
    das("das weights", PARAMETER, NO_CONTRAST),
    das("das weights, replay", PARAMETER, NO_CONTRAST, REPLAY),
)
