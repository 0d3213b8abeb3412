"""Settings of a protection: the mask's, by the names that they have in `method` of a run config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import Field, ValidationError

from das_ds.config import ArchitectureConfig, ImportanceConfig, SoftmaskConfig
from das_ds.config.section import Section
from das_ds.errors import ConfigError

MethodName = Literal["directions", "unit", "parameter"]
METHODS: tuple[str, ...] = get_args(MethodName)
DIRECTIONS: MethodName = "directions"
DEFAULT_METHOD = DIRECTIONS


class DirectionsSettings(Section):
    """Masks of directions; see `das-ds methods directions`."""

    half_saturation: float = Field(default=1.0, gt=0.0)
    """c of the mask P = (I + M / c)^-1; larger protects less."""
    over_domains: Literal["sum", "mean"] = "mean"
    """How M joins the texts that were measured."""
    apply_to: Literal["gradient", "update", "both"] = "both"
    """What P multiplies: `gradient` before the optimizer, `update` after it, or `both`."""
    rank: Literal["auto", "full"] | Annotated[int, Field(ge=1)] = "full"
    """Directions of each input that have a factor of their own, all others sharing one."""
    freeze_unmasked: bool = True
    """Whether biases, normalization and embeddings of positions are trained only until there is something to protect.
    """


@dataclass(frozen=True)
class ElementwiseSettings:
    """Masks by the importance of units or weights."""

    importance: ImportanceConfig
    softmask: SoftmaskConfig


T = TypeVar("T")
IMPORTANCE_KEYS = ("score", "normalization", "protected_fraction", "half_saturation", "scope")
SOFTMASK_KEYS = tuple(SoftmaskConfig.model_fields)
Settings = DirectionsSettings | ElementwiseSettings


def parse_settings(method: str, values: Mapping[str, Any]) -> Settings:
    """The settings of a method, with its defaults.

    Args:
        method: one of `METHODS`.
        values: key -> value.

    Raises:
        ConfigError: unknown method or key, or a value that is not allowed.
    """
    if method not in METHODS:
        raise ConfigError(f"method: found {method!r}, allowed: {' | '.join(METHODS)}")
    allowed = tuple(DirectionsSettings.model_fields) if method == DIRECTIONS else IMPORTANCE_KEYS + SOFTMASK_KEYS
    for key in values:
        if key not in allowed:
            raise ConfigError(
                f"{key}: found with method {method}, which has no such setting; allowed: {_list(allowed)}"
            )
    if method == DIRECTIONS:
        return _build(lambda: DirectionsSettings(**values))
    importance = _build(
        lambda: ImportanceConfig(granularity=method, **{key: values[key] for key in IMPORTANCE_KEYS if key in values})
    )
    softmask = _build(lambda: SoftmaskConfig(**{key: values[key] for key in SOFTMASK_KEYS if key in values}))
    if softmask.apply_to == "first_moment":
        raise ConfigError(
            "apply_to: found first_moment, which needs the moments of das_ds's own optimizer; allowed: update, gradient"
        )
    if method == "parameter" and softmask.include_consumers:
        raise ConfigError("include_consumers: found true with method parameter, expected false or method unit")
    return ElementwiseSettings(importance, softmask)


def parse_architecture(value: Any) -> ArchitectureConfig:
    """A table of units, from a mapping.

    Raises:
        ConfigError: it is none.
    """
    return _build(lambda: ArchitectureConfig.model_validate(value), "architecture.")


def _build(build: Callable[[], T], prefix: str = "") -> T:
    try:
        return build()
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        found = "" if isinstance(first["input"], dict) else f"found {first['input']!r}; "
        raise ConfigError(f"{prefix}{key}: {found}{first['msg']}") from error


def _list(keys: tuple[str, ...]) -> str:
    return ", ".join(sorted(keys))
