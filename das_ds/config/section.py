"""Base of config sections: frozen, typed, one docstring per field, validated at construction."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

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
    """A group of keys; unknown keys are errors, and values are immutable.

    A list of texts that has one entry may be given as that text.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )

    largest: ClassVar[dict[str, int]] = {}
    """Field -> limit of its integers where it is not `LARGEST_INTEGER`."""

    @field_validator("*", mode="before")
    @classmethod
    def _one_text_is_a_list(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None, "fields have names"
        is_list = isinstance(value, str) and _is_list_of_texts(cls.model_fields[info.field_name].annotation)
        return [value] if is_list else value

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


def _is_list_of_texts(annotation: Any) -> bool:
    """Whether a field takes a list of texts (or null), and no single text with another meaning."""
    options = [annotation, *get_args(annotation)] if get_origin(annotation) is not list else [annotation]
    items = [get_args(option)[0] for option in options if get_origin(option) is list]
    return str not in options and any(item is str or _is_text(item) for item in items)


def _is_text(item: Any) -> bool:
    if get_origin(item) is Annotated:
        return get_args(item)[0] is str
    return get_origin(item) is Literal and all(isinstance(choice, str) for choice in get_args(item))
