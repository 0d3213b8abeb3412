"""Base of config sections: frozen, typed, one docstring per field, validated at construction."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, field_validator

from das_ds.user_files import expand_path

LARGEST_INTEGER = 2**32 - 1
"""Limit of integers, so that products of two fit every library."""
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"


PathText = Annotated[str, AfterValidator(expand_path)]
"""Path, glob or hub name, in which `~`, `$NAME` and `${NAME}` are expanded."""
FolderPath = Annotated[Path, AfterValidator(lambda path: Path(expand_path(str(path))))]
"""`PathText` as a `Path`."""


class Section(BaseModel):
    """A group of keys; unknown keys are errors, and values are immutable."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )

    largest: ClassVar[dict[str, int]] = {}
    """Field -> limit of its integers where it is not `LARGEST_INTEGER`."""

    @field_validator("*")
    @classmethod
    def _integers_are_bounded(cls, value: Any, info: ValidationInfo) -> Any:
        limit = cls.largest.get(str(info.field_name), LARGEST_INTEGER)
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, int) and abs(item) > limit:
                # Python refuses to print integers with thousands of digits.
                found = item if abs(item) < 10**30 else f"an integer of {item.bit_length()} bits"
                raise ValueError(f"found {found}, allowed: at most {limit}")
        return value
