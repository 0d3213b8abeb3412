"""Forms of the mask on two ranks: normalized over shards, and trained, against full tensors."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from das_ds.config import ImportanceConfig
from helpers.masks import Weights, magnitudes, normalized_and_trained, owners, to_dense
from helpers.parameter_importance import joined, random_weights_importance, save_random_weights_importance
from helpers.parity import EPS, NUM_STEPS, parity_configs, relative_difference, save_random_importance, steps
from helpers.reference import full_masks, reference_train, unit_ones
from helpers.run_ranks import run_ranks
from helpers.tiny_models import NO_DROPOUT, random_importance, tiny_model

FORMS = [
    ImportanceConfig(normalization=form, scope=scope, protected_fraction=0.3, half_saturation=2.0)  # type: ignore[arg-type]
    for form in ("tanh_positive", "rank_hard", "rank_soft", "saturating")
    for scope in ("tensor", "group", "model")
]
UNITS: list[dict[str, Any]] = [
    {
        "name": "das",
        "softmask": {
            "groups": ["head", "output"],
            "include_consumers": True,
            "exponent": 2.0,
            "unowned_update_scale": 0.5,
        },
    },
    {"name": "das", "softmask": {"groups": ["intermediate"], "exponent": 0.5, "apply_to": "gradient"}},
    {"name": "dga", "softmask": {"apply_to": "gradient"}},
    {"name": "dga", "softmask": {"groups": ["intermediate", "output"], "apply_to": "first_moment"}},
]
PARAMETERS: list[dict[str, Any]] = [
    {"name": "das", "softmask": {"groups": ["intermediate", "unowned"], "exponent": 2.0, "unowned_update_scale": 0.5}},
    {"name": "das", "softmask": {"groups": ["head", "output"], "unowned_update_scale": 0.25, "apply_to": "gradient"}},
    {"name": "das", "softmask": {"groups": ["output"], "unowned_update_scale": 0.5, "apply_to": "first_moment"}},
]


def by_form(raw: torch.Tensor, form: ImportanceConfig) -> torch.Tensor:
    """The importance of (E,) values that are compared with each other, after a sort."""
    if form.normalization == "saturating":
        return raw / (raw + form.half_saturation * raw.mean())
    if form.normalization == "tanh_positive":
        return ((raw - raw.mean()) / raw.std(correction=0)).clamp_min(0).tanh()
    rank = torch.searchsorted(raw.sort().values, raw).double() / len(raw)
    if form.normalization == "rank_soft":
        return rank ** ((1 - form.protected_fraction) / form.protected_fraction)
    # Adding up from the top, complete sets of equal values as long as they fit.
    protected = torch.zeros_like(raw)
    room = round(form.protected_fraction * len(raw))
    for value, size in zip(*(part.flip(0) for part in raw.unique(return_counts=True)), strict=True):
        room -= int(size)
        if room < 0:
            break
        protected[raw == value] = 1.0
    return protected


def full(form: ImportanceConfig) -> Weights:
    raw = {name: values.double() for name, values in magnitudes().items()}
    owner_of = owners()
    keys = {"tensor": {n: n for n in raw}, "group": owner_of, "model": dict.fromkeys(raw, "all")}[form.scope]
    found = {}
    for key in set(keys.values()):
        names = [name for name in raw if keys[name] == key]
        importance = by_form(torch.cat([raw[name] for name in names]), form)
        found.update(zip(names, importance.split([len(raw[name]) for name in names]), strict=True))
    return found


def units_masked(softmask: dict[str, Any]) -> Weights:
    """1 - I' of every weight; the random importance of units that are not masked counts as 0."""
    model = tiny_model()
    importance = random_importance(tiny_model())
    masked = {
        group: 1 - (1 - values) ** softmask.get("exponent", 1.0) if group in softmask["groups"] else 0 * values
        for group, values in importance.items()
    }
    scales = full_masks(model, masked, include_consumers=softmask.get("include_consumers", False))
    for name, owner in owners().items():
        scales[name] = scales[name].double() * (
            softmask.get("unowned_update_scale", 1.0) if owner == "unowned" else 1.0
        )
    return scales


@cache
def expected(granularity: str, number: int) -> Any:
    model = tiny_model(**NO_DROPOUT)
    if granularity == "unit":
        method = UNITS[number]
        gates = random_importance(model)
        scales = units_masked({"groups": ["head"], **method["softmask"]})
    else:
        method = PARAMETERS[number]
        levels = random_weights_importance()
        gates = unit_means(levels)
        softmask = method["softmask"]
        scales = to_dense(levels, softmask["groups"], softmask.get("exponent", 1.0), softmask["unowned_update_scale"])
    if method["name"] == "dga":
        gates = {**unit_ones(model), "head": gates["head"]}
    return reference_train(
        model,
        [[vars(batch) for batch in step] for step in steps()],
        gates,
        scales=scales,
        learning_rates=[1e-2 * (NUM_STEPS - step) / NUM_STEPS for step in range(NUM_STEPS)],
        eps=EPS,
        max_grad_norm=0.5,
        apply_to=method["softmask"].get("apply_to", "update"),
        dtype=torch.float64,
    )


def unit_means(levels: Weights) -> Weights:
    """Gates of o^prev, which softmask.groups does not change: the mean over the weights that each unit owns."""
    model = tiny_model()
    means = {group: torch.zeros_like(ones) for group, ones in unit_ones(model).items()}
    for group, values in means.items():
        for layer, unit in torch.cartesian_prod(*(torch.arange(n) for n in values.shape)).tolist():
            only = {g: torch.zeros_like(v) for g, v in means.items()}
            only[group][layer, unit] = 1.0
            owned = [levels[name][scale == 0] for name, scale in full_masks(model, only).items()]
            values[layer, unit] = torch.cat(owned).float().mean() / 255
    return means


def check_forms_and_masks_equal_those_of_full_tensors(stage: int, folder: Path) -> None:
    """Every form of importance, and a training under every mask, on two ranks."""
    save_random_importance(folder)
    units = {"granularity": "unit", "init_from": str(folder / "importance.safetensors")}
    runs = parity_configs(
        folder, 2, {"stage": stage}, [{**method, "importance": units, "view_dropout": 0.0} for method in UNITS]
    )
    weights_folder = folder / "weights"
    weights_folder.mkdir()
    weights = {"granularity": "parameter", "init_from": str(save_random_weights_importance(weights_folder))}
    runs += parity_configs(folder, 2, {"stage": stage}, [{**method, "importance": weights} for method in PARAMETERS])
    results = run_ranks(normalized_and_trained, 2, runs[0], FORMS, runs, steps(), NO_DROPOUT)
    shapes = {name: values.shape for name, values in magnitudes().items()}
    for number, form in enumerate(FORMS):
        found = joined([rank[0][number] for rank in results], shapes)
        for name, importance in full(form).items():
            assert (found[name] / 255 - importance).abs().max() <= 1 / 510 + 1e-9, (form, name)
    numbers = [*(("unit", n) for n in range(len(UNITS))), *(("parameter", n) for n in range(len(PARAMETERS)))]
    for (granularity, number), (trained, lines) in zip(numbers, results[0][1], strict=True):
        run = expected(granularity, number)
        assert relative_difference(trained, dict(run.model.named_parameters())) <= 1e-5, (granularity, number)
        assert [line["loss/contrast"] for line in lines] == pytest.approx(run.contrast_losses, rel=1e-4)
        assert [line["grad_norm"] for line in lines] == pytest.approx(run.grad_norms, rel=1e-4)
