"""Typed, versioned JSON files that carry a checksum of themselves."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from das_ds.durable import read_checked_json, write_checked_json
from das_ds.errors import RunFolderError

T = TypeVar("T", bound="StoredFile")


class Section(BaseModel):
    """A group of values: frozen, without unknown keys, every number finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class StoredFile(Section):
    """The whole content of a file; it has a field `format_version` with one allowed value, its default."""

    what: ClassVar[str]
    """What the file holds, for messages."""

    def write(self, path: Path) -> None:
        """Write as JSON; a reader finds the old file or the new one, never a part.

        Raises:
            RunFolderError: the folder cannot be written or is full.
        """
        try:
            write_checked_json(path, self.model_dump(mode="json"))
        except OSError as error:
            raise RunFolderError(
                f"{path}: cannot be written ({error.strerror}); its folder must exist, be writable and have free space"
            ) from error

    @classmethod
    def read(cls: type[T], path: Path) -> T:
        """Read what `write` wrote.

        Raises:
            RunFolderError: the file cannot be read, is no such file, was altered, or has another format version.
        """
        try:
            content = read_checked_json(path)
        except OSError as error:
            raise RunFolderError(f"{path}: cannot be read ({error.strerror}); expected {cls.what}") from error
        except ValueError as error:
            raise RunFolderError(f"{path}: {error}; expected {cls.what}") from error
        found, expected = content.get("format_version"), cls.model_fields["format_version"].default
        if found != expected:
            raise RunFolderError(f"{path}: found format_version {found}, expected {cls.what}, {expected}")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise RunFolderError(f"{path}: {_problems(error)}; expected {cls.what}") from error


def _problems(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, found['loc'])) or 'file'}: {found['msg']}" for found in error.errors())
