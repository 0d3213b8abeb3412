"""Run configs in and out: YAML with `dotted.key=value` overrides to `RunConfig`, and back.

Every mistake in a file or an override becomes a one-line `ConfigError` with the dotted key, the value found and the
allowed values; several mistakes are reported together.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from das_ds.config import RunConfig
from das_ds.config.continuation import CONTINUE, complete_from_earlier_run
from das_ds.config.method import load_methods, method_configs, parse_method
from das_ds.config.schema import METHOD, ConfigKey, config_keys, method_keys, methods_with_key, nearest_keys, table_key
from das_ds.errors import ConfigError, RunFolderError
from das_ds.user_files import read_text

MAX_FOUND_LENGTH = 80
MAX_DEPTH = 50
MAX_NODES = 1_000_000

# Keys, or sections of them, that may change when a run resumes: location, data loading speed, logging, saving and
# stopping, and, with ZeRO stage and micro-batch, how the work is divided. None of them changes the order of the data,
# nor a weight beyond the order of floating-point sums. Training reads neither `tasks` nor `benchmarks`.
MUTABLE_KEYS = (
    "output_dir",
    "tracking",
    "wandb",
    "train.log_interval",
    "data.num_workers",
    "data.cache_dir",
    "evaluation.batch_size",
    "tasks",
    "benchmarks",
    "checkpoint",
    "export",
    "runtime",
    "deepspeed",
    "train.micro_batch_size",
)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key may occur only once and 1e-4 is a number, as in YAML 1.2."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value} found twice", key.start_mark)
            seen.add((key.tag, str(key.value)))
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a run config and apply overrides such as `train.learning_rate=1e-4` or `domains.0.name=acl`.

    Args:
        path: YAML file.
        overrides: `dotted.key=value`, applied in order; the value is read as YAML, a number in the key is the
            position in a list, one past its end appends.

    Raises:
        ConfigError: file missing or not a YAML mapping, key unknown or given twice, value of a wrong type or out of
            range, override that is not `dotted.key=value`.
    """
    return parse_config(read_mapping(Path(path)), overrides or [])


def parse_config(values: Mapping[str, Any], overrides: Sequence[str]) -> RunConfig:
    """A run config from its nested values and overrides; see `load_config`.

    What it leaves out is taken from the run that it continues, if there is one; overrides come before that.
    """
    raw = dict(values)
    for override in overrides:
        _apply_override(raw, override)
    return _validate(complete_from_earlier_run(raw, _read_recorded))


def _validate(raw: Mapping[str, Any]) -> RunConfig:
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        method = _method_name(raw)
        messages = dict.fromkeys(_message(detail, method) for detail in error.errors())
        raise ConfigError("; ".join(messages)) from None


def _read_recorded(path: Path) -> dict[str, Any]:
    """The complete values of a config that a run has recorded.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        return resolved_dict(_validate(read_mapping(path)))
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(str(path)) else f"{path}: {text}") from None


def read_mapping(
    path: Path,
    kind: str = "a run config in YAML",
    content: str = "a mapping with keys such as output_dir, model and domains",
) -> dict[str, Any]:
    """The mapping at the top of a YAML (or JSON) file.

    Args:
        path: the file.
        kind: expected kind of file, for messages.
        content: expected content, for messages.

    Raises:
        ConfigError: missing, unreadable, no YAML or no mapping.
    """
    try:
        raw = _parse_yaml(read_text(path), source=str(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; expected {kind}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); expected {kind}") from None
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else _found(raw)
        raise ConfigError(f"{path}: found {found}, expected {content}")
    return raw


def resolved_dict(config: RunConfig) -> dict[str, Any]:
    """The complete config, defaults included, as plain values for YAML and JSON."""
    return config.model_dump(mode="json", by_alias=True)


def dump_config(config: RunConfig, path: str | Path) -> None:
    """Write the resolved config as YAML, atomically.

    Raises:
        RunFolderError: the file cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(yaml.safe_dump(resolved_dict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RunFolderError(f"{path}: cannot be written ({error.strerror}); expected a writable folder") from None


def config_differences(old: RunConfig, new: RunConfig) -> list[str]:
    """One text for each dotted key in which two configs differ, with both values; `MUTABLE_KEYS` are omitted."""
    before = dict(_flatten(resolved_dict(old)))
    after = dict(_flatten(resolved_dict(new)))
    return [
        f"{key}: was {_shown(before, key)}, now {_shown(after, key)}"
        for key in dict.fromkeys([*before, *after])
        if not _is_mutable(key) and _shown(before, key) != _shown(after, key)
    ]


def config_values(config: RunConfig) -> dict[str, str]:
    """Dotted key -> value as text, for every key."""
    values = dict(_flatten(resolved_dict(config)))
    return {key: _shown(values, key) for key in values}


def identity_values(config: RunConfig) -> dict[str, Any]:
    """Dotted key -> plain value, for every key that decides the numbers of a run: all but `MUTABLE_KEYS`."""
    return {key: value for key, value in _flatten(resolved_dict(config)) if not _is_mutable(key)}


def values_set(config: RunConfig) -> dict[str, str]:
    """Dotted key -> value as text, for the keys that are required or differ from their default."""
    rows = config_keys(config.method.name)
    values = dict(_flatten(resolved_dict(config)))
    return {
        key: _shown(values, key)
        for key, value in values.items()
        if (row := rows.get(table_key(key))) is None or row.required or row.default != value
    }


def method_defaults(name: str) -> dict[str, Any]:
    """Dotted key -> plain default value, for every key of the section `method` of one method."""
    return dict(_flatten(parse_method(name).model_dump(mode="json", by_alias=True), METHOD))


def _parse_yaml(text: str, source: str) -> Any:
    try:
        node = yaml.load(text, Loader=_Loader)
        _check_nesting(node)
        return node
    # Explicit tags such as `!!timestamp x` make PyYAML raise any exception of the conversion.
    except Exception as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        if not isinstance(error, yaml.YAMLError | ValueError):
            problem = f"a value that cannot be converted ({type(error).__name__}: {problem})"
        raise ConfigError(f"{source}: not valid YAML{place}: {problem}") from None


def _check_nesting(node: Any) -> None:
    """Raises ValueError where aliases make a node contain itself, or text of a few lines a tree without end."""
    nodes = [node]
    num_nodes = 0
    for _ in range(MAX_DEPTH):
        nodes = [child for parent in nodes for child in _children(parent)]
        num_nodes += len(nodes)
        if num_nodes > MAX_NODES:
            raise ValueError(f"found more than {MAX_NODES} values, which aliases repeat")
        if not nodes:
            return
    raise ValueError(f"found more than {MAX_DEPTH} values within each other; does an alias contain itself?")


def _children(node: Any) -> list[Any]:
    if isinstance(node, dict):
        return list(node.values())
    return list(node) if isinstance(node, list | tuple | set) else []


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    for section, first_key in ((METHOD, "name"), (CONTINUE, "run")):
        # Sections for which a text may stand.
        if names[0] == section and len(names) > 1 and isinstance(raw.get(section), str):
            raw[section] = {first_key: raw[section]}
    if not equals or not all(names):
        raise ConfigError(f"override {override!r}: expected dotted.key=value, for example train.learning_rate=1e-4")
    value = _parse_yaml(text, source=f"override {override!r}")
    node: Any = raw
    for depth, name in enumerate(names[:-1], start=1):
        node = _descend(node, name, ".".join(names[:depth]), next_name=names[depth])
    _put(node, names[-1], value, key.strip())


def _descend(node: Any, name: str, key: str, next_name: str) -> Any:
    """The mapping or list under `name`; created, or copied from the default, where it is missing."""
    child = _get(node, name)
    if child is None:
        row = config_keys().get(table_key(key))
        child = row.default if row is not None else None
    if child is None:
        child = [] if next_name.isdecimal() else {}
    if isinstance(child, str) and next_name.isdecimal():
        # A list of one text may be given as that text.
        child = [child]
    if not isinstance(child, dict | list):
        raise ConfigError(f"override {key}.{next_name}: {key} is {_found(child)}, a value without keys below it")
    child = child.copy()
    _put(node, name, child, key)
    return child


def _get(node: Any, name: str) -> Any:
    if isinstance(node, dict):
        return node.get(name)
    return node[int(name)] if name.isdecimal() and int(name) < len(node) else None


def _put(node: Any, name: str, value: Any, key: str) -> None:
    if isinstance(node, dict):
        node[name] = value
    elif name.isdecimal() and int(name) <= len(node):
        node[int(name) : int(name) + 1] = [value]
    else:
        raise ConfigError(f"override {key}: found position {name!r}, allowed: 0 to {len(node)} ({len(node)} appends)")


def _method_name(raw: Mapping[str, Any]) -> str | None:
    """Name of the method in the values of a config; None where there is none of this name."""
    section = raw.get(METHOD, {})
    name = section.get("name", load_methods().DEFAULT_METHOD) if isinstance(section, dict) else section
    return name if isinstance(name, str) and name in method_configs() else None


def _message(detail: ErrorDetails, method: str | None) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] in ("extra_forbidden", "invalid_key"):
        return f"{key}: unknown key; {_hint(key, method)}"
    if detail["type"] == "value_error":
        return f"{key}: {detail['ctx']['error']}".removeprefix(": ")
    key, row = _split_key(key, method)
    if detail["type"] == "missing":
        return f"{key}: not given, expected: {row.allowed}"
    return f"{key}: found {_found(detail['input'])}, allowed: {row.allowed}"


def _split_key(key: str, method: str | None) -> tuple[str, ConfigKey]:
    """The key that a user wrote and its row in the table.

    Below the row pydantic adds the position in a list of plain values, which is kept, or the type it tried for a value
    of several types, which is not.
    """
    known = key
    rows = config_keys(method)
    while table_key(known) not in rows:
        known = known.rpartition(".")[0]
    position = key[len(known) + 1 :]
    return (key if position.isdecimal() else known), rows[table_key(known)]


def _hint(key: str, method: str | None) -> str:
    section, _, leaf = key.rpartition(".")
    if section == METHOD and leaf in method_configs():
        keys = [row.key for row in method_keys(leaf) if row not in method_keys()]
        place = "method itself" if leaf == method else f"method itself, with method.name {leaf}"
        return f"the keys of {leaf} are in {place}: {', '.join(keys)}"
    if methods := methods_with_key(key):
        return f"method is {method}, this key belongs to {', '.join(methods)}; method=NAME replaces the section"
    nearest = nearest_keys(key, method)
    if nearest:
        return f"did you mean {' or '.join(nearest)}?"
    allowed = [row.leaf for row in config_keys(method).values() if row.section == table_key(section)]
    return f"allowed {f'in {section}' if section else 'at the top'}: {', '.join(allowed)}"


def _found(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:
        # Python refuses to print integers with thousands of digits.
        return "an integer of thousands of digits"
    return text if len(text) <= MAX_FOUND_LENGTH else text[:MAX_FOUND_LENGTH] + "..."


def _flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every leaf; a list of plain values is one leaf."""
    if isinstance(node, list) and any(isinstance(item, dict) for item in node):
        node = {str(position): item for position, item in enumerate(node)}
    if not isinstance(node, dict) or not node:
        yield prefix, node
        return
    for name, child in node.items():
        yield from _flatten(child, f"{prefix}.{name}" if prefix else name)


def _shown(values: dict[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "not given"


def _is_mutable(key: str) -> bool:
    return any(key == mutable or key.startswith(f"{mutable}.") for mutable in MUTABLE_KEYS)
