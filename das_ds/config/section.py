"""What every section of a run config is: frozen, typed, one docstring per field, checked when it is built."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"


class Section(BaseModel):
    """A group of keys; unknown keys are errors and values never change after construction."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )
