"""The variants that are compared; to add one, add a line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.domains.plan import NAIVE, Variant, merged

NO_CONTRAST = {"contrast": {"weight": 0.0}}
PARAMETER = {"importance": {"granularity": "parameter", "normalisation": "tanh_positive"}}
DIRECTIONS: dict[str, Any] = {
    "importance": {"granularity": "direction", "normalisation": "saturating", "saturation": 3.0},
    **NO_CONTRAST,
}
MERGING = {"merge": {"coefficient": 0.3}}
REPLAY: dict[str, Any] = {"replay": {"share": 0.0625}}
"""1 of 16 sequences, the nearest to 5 % that a batch of 16 can hold."""


def das(label: str, *sections: dict[str, Any]) -> Variant:
    """das with keys of the section `method`."""
    return Variant(label, {"method": merged({"name": "das"}, *sections)})


def searched(saturation: float) -> Variant:
    """Another c of the mask of directions."""
    other = das(f"das directions {saturation:g}", DIRECTIONS, {"importance": {"saturation": saturation}})
    return replace(other, is_compared=False)


VARIANTS = (
    Variant(NAIVE, {"method": {"name": "ncl"}}),
    Variant("one", {"method": {"name": "one"}}),
    Variant("pool", {"method": {"name": "pool"}}),
    Variant("lora", {"method": {"name": "ncl"}, "model": {"lora": {"rank": 8}}}, rate_scale=5.0),
    Variant("replay", {"method": {"name": "replay", **REPLAY}}),
    Variant("derpp", {"method": {"name": "derpp"}}),
    Variant("ewc", {"method": {"name": "ewc"}}),
    Variant("kd", {"method": {"name": "kd"}}),
    Variant("merge", {"method": {"name": "merge", **MERGING}}),
    Variant("dga", {"method": {"name": "dga"}}),
    das("das published", {"softmask": {"apply_to": "gradient"}}),
    das("das"),
    das("das weights", PARAMETER, NO_CONTRAST),
    das("das directions", DIRECTIONS),
    searched(1.0),
    searched(10.0),
    searched(30.0),
    das("das directions, merging", DIRECTIONS, MERGING),
    das("das directions, replay", DIRECTIONS, REPLAY),
)
