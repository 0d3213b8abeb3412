"""Config keys as one flat table: allowed values, default and meaning of each.

The table is derived from the classes in `config/` and serves the help text and the error messages. A list of
sections is in it as its first entry (`domains.0.name`), which is also how an override addresses it.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from das_ds.config import RunConfig
from das_ds.config.method import MethodConfig, load_methods, method_configs

MAX_SUGGESTIONS = 3
RENAMED_KEYS = {
    "checkpoint.asynchronous": "checkpoint.async_save",
    "checkpoint.every_steps": "checkpoint.interval",
    "checkpoint.keep": "checkpoint.keep_last",
    "data.isolate_documents": "data.document_mask",
    "faults.spike_deviations": "faults.spike_sigma",
    "method.contrast": "method.contrastive",
    "method.importance.initial": "method.importance.init_from",
    "method.importance.kind": "method.importance.score",
    "method.importance.normalisation": "method.importance.normalization",
    "method.importance.protected_share": "method.importance.protected_fraction",
    "method.importance.samples": "method.importance.num_samples",
    "method.importance.saturation": "method.importance.half_saturation",
    "method.merge.coefficient": "method.merge.weight",
    "method.replay.share": "method.replay.fraction",
    "method.softmask.readers": "method.softmask.include_consumers",
    "method.softmask.shared_scale": "method.softmask.unowned_update_scale",
    "method.softmask.strength": "method.softmask.exponent",
    "model.adapter": "model.architecture",
    "model.architecture.rules.0.reader": "model.architecture.rules.0.consumer",
    "model.architecture.rules.0.spread": "model.architecture.rules.0.layout",
    "model.lora.initial": "model.lora.init_from",
    "run": "runtime",
    "train.grad_clip": "train.max_grad_norm",
    "train.log_every": "train.log_interval",
    "train.logits_mib": "train.max_logits_mib",
    "train.schedule": "train.lr_scheduler",
}
"""Former name of a key -> its name, for the error on a config that still has the former one.

Methods whose keys were in a section of their own have them in `method` itself, see `_hint` in `config/io.py`.
"""
BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


@dataclass(frozen=True)
class ConfigKey:
    """One dotted key of the run config."""

    key: str
    allowed: str
    """Type, bounds and choices in words."""
    default: Any
    """Default value; `None` also where the key is required or a section."""
    required: bool
    is_section: bool
    """True for a group of keys, false for a value."""
    meaning: str

    @property
    def section(self) -> str:
        """Dotted key of the section of this key; empty at the top."""
        return self.key.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        """Last name of the key."""
        return self.key.rpartition(".")[2]


METHOD = "method"
"""Section whose keys depend on the method."""


@cache
def config_keys(method: str | None = None) -> dict[str, ConfigKey]:
    """All keys of `RunConfig` in the order of their declaration, a section before its keys.

    Args:
        method: name of the method whose keys the section `method` has; None: those that all methods have.
    """
    schema = RunConfig.model_json_schema()
    rows: list[ConfigKey] = []
    for row in _walk(schema, schema["$defs"], prefix=""):
        if row.key == METHOD:
            rows += [row, *method_keys(method)]
        elif not row.key.startswith(f"{METHOD}."):
            rows.append(row)
    return {row.key: row for row in rows}


@cache
def method_keys(method: str | None = None) -> tuple[ConfigKey, ...]:
    """Keys of the section `method` for one method; None: those that all methods have."""
    configs = method_configs()
    schema = (MethodConfig if method is None else configs[method]).model_json_schema()
    rows = list(_walk(schema, schema["$defs"], prefix=f"{METHOD}."))
    name = f"{METHOD}.name"
    meaning = str(MethodConfig.model_fields["name"].description)
    named = ConfigKey(name, " | ".join(configs), load_methods().DEFAULT_METHOD, False, False, meaning)
    common = [row for row in rows if row.key.split(".")[1] in MethodConfig.model_fields and row.key != name]
    return (named, *(row for row in rows if row not in common and row.key != name), *common)


def methods_with_key(key: str) -> list[str]:
    """Names of the methods whose section has a dotted key `method.*`."""
    return [name for name in method_configs() if any(row.key == table_key(key) for row in method_keys(name))]


def table_key(key: str) -> str:
    """The row of `key`: every list index becomes 0, as only first entries are in the table."""
    return re.sub(r"\.\d+(?=\.|$)", ".0", key)


def nearest_keys(key: str, method: str | None = None) -> list[str]:
    """Known keys that a misspelled or misplaced `key` may mean, best first; may be empty.

    Args:
        key: dotted, as in the config.
        method: name of the method of the config.

    The new name of a renamed key is the only suggestion. Else a similar name in the same section comes first, then the
    same name elsewhere, then a similar name elsewhere.
    """
    section, _, leaf = key.rpartition(".")
    if renamed := RENAMED_KEYS.get(table_key(key)):
        new_section, _, new_leaf = renamed.rpartition(".")
        # The position in a list is the user's.
        return [f"{section}.{new_leaf}" if new_section and new_section == table_key(section) else renamed]
    rows = list(config_keys(method).values())
    siblings = {row.leaf: f"{section}.{row.leaf}".lstrip(".") for row in rows if row.section == table_key(section)}
    found = [siblings[name] for name in difflib.get_close_matches(leaf, siblings, n=1)]
    # Those of all domains or tasks before those of one.
    found += sorted((row.key for row in rows if row.leaf == leaf), key=lambda other: ".0." in other)
    if not found:
        # Elsewhere only what is hardly another word.
        close = difflib.get_close_matches(leaf, {row.leaf for row in rows}, n=1, cutoff=0.75)
        found = [row.key for row in rows if row.leaf in close]
    return found[:MAX_SUGGESTIONS]


def _walk(schema: dict[str, Any], definitions: dict[str, Any], prefix: str) -> Iterator[ConfigKey]:
    for name, node in schema["properties"].items():
        key = prefix + name
        section = _find_section(node, definitions)
        is_list = node.get("type") == "array" and section is not None
        yield ConfigKey(
            key=key,
            allowed=_allowed(node),
            default=node.get("default") if section is None or is_list else None,
            required=name in schema.get("required", []),
            is_section=section is not None and not is_list,
            meaning=node.get("description") or (section or {}).get("description", ""),
        )
        if section is not None:
            if is_list:
                key += ".0"
                yield ConfigKey(key, "mapping", None, False, True, section["description"])
            yield from _walk(section, definitions, prefix=key + ".")


def _find_section(node: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any] | None:
    """Schema of the section under a key, alone, optional or in a list; None for plain values."""
    for candidate in (node, node.get("items", {}), *node.get("anyOf", [])):
        if "$ref" in candidate:
            definition: dict[str, Any] = definitions[candidate["$ref"].rpartition("/")[2]]
            return definition
    return None


def _allowed(node: dict[str, Any]) -> str:
    if "anyOf" in node:
        return " or ".join(_allowed(option) for option in node["anyOf"])
    if "enum" in node:
        return " | ".join(node["enum"])
    if "const" in node:
        return str(node["const"])
    if "prefixItems" in node:
        return f"list of {len(node['prefixItems'])}: " + ", ".join(_allowed(item) for item in node["prefixItems"])
    bounds = " and ".join(f"{sign} {_number(node[bound])}" for bound, sign in BOUNDS.items() if bound in node)
    match node.get("type"):
        case "array":
            least = f", at least {node['minItems']}" if "minItems" in node else ""
            items = _allowed(node["items"])
            return f"list of {'mappings' if items == 'mapping' else items}{least}"
        case "boolean":
            return "true | false"
        case "string":
            return f"text matching {node['pattern']}" if "pattern" in node else "text"
        case "integer" | "number" | "null" as plain:
            return f"{plain} {bounds}".rstrip()
        case _:
            return "mapping"


def _number(bound: float) -> str:
    return json.dumps(bound).removesuffix(".0")
