"""The variants to compare; add a line to add one.

`directions` is the method as shipped. Like its rivals it sees no general text; `directions, general` protects the
general corpus too, and `directions, first form` is the earlier default, of which there are older results.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.domains.plan import NAIVE, Values, Variant, merge_values

NO_CONTRAST: Values = {"contrastive": {"weight": 0.0}}
ONE_SIDED: Values = {"importance": {"normalization": "tanh_positive"}}
PARAMETER: Values = {"importance": {"granularity": "parameter", "normalization": "tanh_positive"}}
FISHER: Values = {"importance": {"score": "squared_grad", "normalization": "saturating", "scope": "model"}}
FIRST_MOMENT: Values = {"softmask": {"apply_to": "first_moment"}}
REPLAY: Values = {"replay": {"fraction": 0.0625}}
"""1 of 16 sequences, the nearest to 5 % that a batch of 16 can hold."""
REPLAY_IN_8: Values = {"replay": {"fraction": 0.125}}
"""1 of 8 sequences, the fewest that a batch of 8 can hold."""


def method(label: str, name: str, **keys: object) -> Variant:
    """A method with keys of its section."""
    return Variant(label, {"method": {"name": name, **keys}})


def das(label: str, *sections: Values) -> Variant:
    """das with keys of the section `method`."""
    return Variant(label, {"method": merge_values({"name": "das"}, *sections)})


def directions(label: str, **keys: object) -> Variant:
    """directions as shipped but for these keys, without general text unless they say otherwise."""
    return method(label, "directions", **{"general": False, **keys})


def first_form(label: str, half_saturation: float = 3.0, **keys: object) -> Variant:
    """The first form of directions, that of the oldest results: a mask of updates by the sum, and nothing frozen."""
    form = {
        "apply_to": "update",
        "half_saturation": half_saturation,
        "over_domains": "sum",
        "freeze_unmasked": False,
    }
    return directions(label, **form, **keys)


def merging(weight: float) -> Values:
    """Averaging of weights after each domain, with any method."""
    return {"merge": {"weight": weight}}


def strengths(name: str, key: str, *values: float, **keys: object) -> list[Variant]:
    """A method with several values of a key of its section, the best of which is compared under its name.

    `keys` are the same in all of them.
    """
    return [replace(method(f"{name} {value:g}", name, **{key: value}, **keys), strength_of=name) for value in values]


def searched(*variants: Variant) -> list[Variant]:
    """Variants that only take part in the search: other values of a method's settings."""
    return [replace(variant, is_compared=False) for variant in variants]


NAIVE_TRAINING = method(NAIVE, "ncl")
DIRECTIONS = directions("directions")
FIRST_FORM = first_form("directions, first form")
REPLAYING = method("replay", "replay", **REPLAY)
EWC = strengths("ewc", "lambda", 1e3, 1e4, 1e5)
OSFT = strengths("osft", "unfreeze_rank_ratio", 0.1, 0.25, 0.5)
DAS_PUBLISHED = das("das published", {"softmask": {"apply_to": "gradient"}})
FASTER = 4.0
SLOWER = 0.25
"""Factors of the candidate learning rates of some variants."""

METHODS = (
    NAIVE_TRAINING,
    DIRECTIONS,
    *searched(*(directions(f"directions {c:g}", half_saturation=c) for c in (0.3, 3.0))),
    directions("directions, replay", **REPLAY),
    REPLAYING,
    *OSFT,
    *EWC,
    *strengths("kd", "weight", 1e2, 1e3, 1e4),
    das("first moment", PARAMETER, NO_CONTRAST, FIRST_MOMENT),
    das("first moment, units", NO_CONTRAST, FIRST_MOMENT),
    directions("directions, general", general=True),
    FIRST_FORM,
    DAS_PUBLISHED,
    *strengths("l2", "lambda", 0.01, 0.1, 1.0),
    # A model of masked tokens gives most of them a perplexity far above the published limit of 2.5.
    *strengths("stm", "max_perplexity", 2.5, 50.0, 1000.0),
    *strengths("freeze", "num_layers", 2, 4),
    Variant("ncl, layer decay", {"method": {"name": NAIVE}, "train": {"layer_lr_decay": 0.8}}),
    *(
        replace(method(f"merge {weight:g}", "merge", **merging(weight)), strength_of="merge")
        for weight in (0.3, 0.5, 0.7)
    ),
    # Like directions, without general text.
    *strengths("regmean", "off_diagonal", 0.5, 0.9, 1.0, general=False),
    method("derpp", "derpp"),
    Variant("lora", {"method": {"name": NAIVE}, "model": {"lora": {"rank": 8}}}, rate_scale=4.0),
    method("one", "one"),
    method("pool", "pool"),
)
"""Methods compared with each other."""

MASKS = (
    NAIVE_TRAINING,
    *searched(
        replace(NAIVE_TRAINING, label="ncl, faster", rate_scale=FASTER),
        # Further points of the naive front that the others are compared with.
        replace(NAIVE_TRAINING, label="ncl, slower", rate_scale=SLOWER),
    ),
    method("dga", "dga"),
    DAS_PUBLISHED,
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
    FIRST_FORM,
    # Does a mask that blocks part of each update allow a higher rate?
    *searched(replace(first_form("directions, first form, faster"), rate_scale=FASTER)),
    first_form("directions, first form, merging", **merging(0.3)),
    DIRECTIONS,
)
"""Forms of the mask of das."""

RIVALS_IN_8 = (
    method("replay", "replay", **REPLAY_IN_8),
    method("ewc 10000", "ewc", **{"lambda": 1e4}),
    *searched(*(method(f"ewc {factor:g}", "ewc", **{"lambda": factor}) for factor in (1e3, 1e5))),
    method("kd 1000", "kd", weight=1e3),
    *searched(*(method(f"kd {weight:g}", "kd", weight=weight) for weight in (1e2, 1e4))),
    first_form("directions, first form, replay", **REPLAY_IN_8),
)
"""Methods that the best mask has to beat, and the mask with replay, for batches of 8. The strengths are those chosen
from a larger set for batches of 16, with their neighbors."""
