"""Custom architecture specs: `model.architecture` of a run config -> `ArchitectureSpec`, and back."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from das_ds.config import ArchitectureConfig
from das_ds.functional.units import UnitRule
from das_ds.models.architectures.spec import DROPOUT_ATTRIBUTES, ArchitectureSpec, GateSite


def spec_from_config(section: ArchitectureConfig, model_type: str) -> ArchitectureSpec:
    """The spec in a run config, for models of `model_type`."""
    return ArchitectureSpec(
        model_type=model_type,
        objective=section.objective,
        units=section.units.model_dump(exclude_none=True),
        rules=tuple(UnitRule(**rule.model_dump()) for rule in section.rules),
        sites=tuple(GateSite(**site.model_dump()) for site in section.sites),
        unmasked=tuple(section.unmasked),
        lm_head=tuple(section.lm_head),
        embeddings=tuple(section.embeddings),
        embedding_head=section.embedding_head,
        key_value_heads=section.key_value_heads,
        logit_cap_attribute=section.logit_cap_attribute,
        position_offset=section.position_offset,
        dropouts=DROPOUT_ATTRIBUTES if section.dropouts is None else tuple(section.dropouts),
    )


def spec_to_config(spec: ArchitectureSpec) -> dict[str, Any]:
    """The spec as plain values of `model.architecture`, without the defaults."""
    values = asdict(spec)
    # `unsupported` is code; the model that the section is printed for has passed it.
    del values["model_type"], values["unsupported"]
    if spec.dropouts == DROPOUT_ATTRIBUTES:
        del values["dropouts"]
    return ArchitectureConfig.model_validate(
        {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    ).model_dump(exclude_defaults=True)
