"""The variants to compare; add a line to add one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.domains.plan import NAIVE, Variant, merge_values

NO_CONTRAST = {"contrastive": {"weight": 0.0}}
ONE_SIDED = {"importance": {"normalization": "tanh_positive"}}
PARAMETER = {"importance": {"granularity": "parameter", "normalization": "tanh_positive"}}
FISHER = {"importance": {"score": "squared_grad", "normalization": "saturating", "scope": "model"}}
MERGING: dict[str, Any] = {"merge": {"weight": 0.3}}
REPLAY: dict[str, Any] = {"replay": {"fraction": 0.0625}}
"""1 of 16 sequences, the nearest to 5 % that a batch of 16 can hold."""
REPLAY_IN_8: dict[str, Any] = {"replay": {"fraction": 0.125}}
"""1 of 8 sequences, the fewest that a batch of 8 can hold."""


def das(label: str, *sections: dict[str, Any]) -> Variant:
    """das with keys of the section `method`."""
    return Variant(label, {"method": merge_values({"name": "das"}, *sections)})


def searched(*variants: Variant) -> list[Variant]:
    """Variants that only take part in the learning-rate search: other values of a method's settings."""
    return [replace(variant, is_compared=False) for variant in variants]


def ewc(factor: float) -> Variant:
    """ewc with a lambda of its penalty."""
    return Variant(f"ewc {factor:g}", {"method": {"name": "ewc", "lambda": factor}})


def kd(weight: float) -> Variant:
    """kd with a factor of its divergence."""
    return Variant(f"kd {weight:g}", {"method": {"name": "kd", "weight": weight}})


def directions(label: str, half_saturation: float = 3.0, **common: dict[str, Any]) -> Variant:
    """directions with a c of its mask on updates, the form of all recorded results, and keys that all methods have."""
    form = {"apply_to": "update", "half_saturation": half_saturation, "general": False, "freeze_unmasked": False}
    return Variant(label, {"method": {"name": "directions", **form, **common}})


NAIVE_TRAINING = Variant(NAIVE, {"method": {"name": "ncl"}})
FASTER = 4.0
SLOWER = 0.25
"""Factors of the candidate learning rates of some variants."""

METHODS = (
    NAIVE_TRAINING,
    Variant("one", {"method": {"name": "one"}}),
    Variant("pool", {"method": {"name": "pool"}}),
    Variant("lora", {"method": {"name": "ncl"}, "model": {"lora": {"rank": 8}}}, rate_scale=5.0),
    Variant("replay", {"method": {"name": "replay", **REPLAY}}),
    Variant("derpp", {"method": {"name": "derpp"}}),
    ewc(1e4),
    *searched(Variant("ewc", {"method": {"name": "ewc"}}), ewc(100.0), ewc(1000.0), ewc(1e5)),
    kd(1000.0),
    *searched(Variant("kd", {"method": {"name": "kd"}}), kd(10.0), kd(100.0), kd(3000.0), kd(10_000.0)),
    Variant("merge", {"method": {"name": "merge", **MERGING}}),
    directions("directions"),
    *searched(*(directions(f"directions {c:g}", c) for c in (1.0, 10.0, 30.0))),
    directions("directions, replay", **REPLAY),
)
"""Methods compared with each other."""

MASKS = (
    NAIVE_TRAINING,
    *searched(
        replace(NAIVE_TRAINING, label="ncl, faster", rate_scale=FASTER),
        # Further points of the naive front that the others are compared with.
        replace(NAIVE_TRAINING, label="ncl, slower", rate_scale=SLOWER),
    ),
    Variant("dga", {"method": {"name": "dga"}}),
    das("das published", {"softmask": {"apply_to": "gradient"}}),
    das("das"),
    das("das weights", PARAMETER, NO_CONTRAST),
    *searched(
        das("das units", NO_CONTRAST),
        das("das one-sided", ONE_SIDED, NO_CONTRAST),
        das("das readers", ONE_SIDED, NO_CONTRAST, {"softmask": {"include_consumers": True}}),
        das("das FFN", ONE_SIDED, NO_CONTRAST, {"softmask": {"groups": ["intermediate", "output"]}}),
        das("das weights Fisher", PARAMETER, NO_CONTRAST, FISHER),
        das("das weights ranks", PARAMETER, NO_CONTRAST, {"importance": {"normalization": "rank_hard"}}),
        das("das weights sensitivity", PARAMETER, NO_CONTRAST, {"importance": {"score": "grad_x_weight"}}),
        das("das weights shared", PARAMETER, NO_CONTRAST, {"softmask": {"unowned_update_scale": 0.25}}),
    ),
    directions("directions"),
    # Does a mask that blocks part of each update allow a higher rate?
    *searched(replace(directions("directions, faster"), rate_scale=FASTER)),
    directions("directions, merging", **MERGING),
)
"""Forms of the mask of das."""

RIVALS = (
    Variant("replay", {"method": {"name": "replay", **REPLAY_IN_8}}),
    ewc(1e4),
    *searched(ewc(1000.0), ewc(1e5)),
    kd(1000.0),
    *searched(kd(100.0), kd(10_000.0)),
    directions("directions, replay", **REPLAY_IN_8),
)
"""Methods that the best mask has to beat, and the mask with replay, for batches of 8. The strengths are those chosen
from a larger set for batches of 16, with their neighbors."""
