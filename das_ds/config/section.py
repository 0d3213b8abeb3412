"""What every section of a run config is: frozen, typed, one docstring per field, checked when it is built."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, field_validator

from das_ds.user_files import expand_path

LARGEST_INTEGER = 2**32 - 1
"""Of any key: products of two of them are numbers that every library can hold."""
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"


PathText = Annotated[str, AfterValidator(expand_path)]
"""A path, glob or name of text or a model: `~`, `$NAME` and `${NAME}` are replaced when a config is read."""
FolderPath = Annotated[Path, AfterValidator(lambda path: Path(expand_path(str(path))))]
"""The same as a path object."""


class Section(BaseModel):
    """A group of keys; unknown keys are errors and values never change after construction."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )

    @field_validator("*")
    @classmethod
    def _integers_are_bounded(cls, value: Any) -> Any:
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, int) and abs(item) > LARGEST_INTEGER:
                # Python does not write whole numbers of thousands of digits.
                found = item if abs(item) < 10**30 else f"a whole number of {item.bit_length()} bits"
                raise ValueError(f"found {found}, allowed: at most {LARGEST_INTEGER}")
        return value
