"""Nested values of a run config, changed section by section."""

from __future__ import annotations

from typing import Any

DEFAULT_METHOD = "das"


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Values with the keys of `changes` in each section; the section of another method replaces that of the first."""
    result = dict(values)
    for key, value in changes.items():
        is_section = isinstance(value, dict) and isinstance(values.get(key), dict)
        is_other_method = key == "method" and _name(value) != _name(values.get(key, {}))
        result[key] = {**values[key], **value} if is_section and not is_other_method else value
    return result


def _name(method: Any) -> str:
    return str(method.get("name", DEFAULT_METHOD) if isinstance(method, dict) else method)
