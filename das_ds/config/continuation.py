"""Section `continue_from`: the earlier run that a run continues, and what its config takes from that of the earlier."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from das_ds.config.section import NAME_PATTERN, FolderPath, Section
from das_ds.errors import ConfigError
from das_ds.user_files import expand_path

CONTINUE = "continue_from"
RECORDED_CONFIG = "config.yaml"
"""Name of the resolved config in a run folder."""
OWN_KEYS = ("output_dir", CONTINUE, "domains", "tasks", "wandb")
"""Sections that a config does not take from the run that it continues."""


class ContinueConfig(Section):
    """The earlier run that a run continues with further domains; `continue_from: RUN` is short for its `run`."""

    run: FolderPath
    """Run folder of the earlier run, which is only read; every key that this config leaves out is as there."""
    after: str | None = Field(default=None, pattern=NAME_PATTERN)
    """Domain of the earlier run after which this one continues; null: its last one."""
    evaluate: bool = True
    """Whether corpora of earlier domains are still evaluated, and replayed where the method replays, which needs their
    text; false: their columns of the loss matrix end."""

    @property
    def in_words(self) -> str:
        """The run and the domain."""
        return f"{self.run} after {self.after}"

    @model_validator(mode="before")
    @classmethod
    def _text_is_run(cls, value: Any) -> Any:
        return {"run": value} if isinstance(value, str | Path) else value


def complete_from_earlier_run(raw: Mapping[str, Any], read: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
    """Values of a config with those of the run that it continues: earlier domains first, and all keys left out.

    A mapping is completed key by key. The config that a run records is complete, and stands for itself where the
    earlier run is no longer there.

    Args:
        raw: values of a config; without `continue_from` they are returned as they are.
        read: path of a recorded config -> its values, which it has checked; raises ConfigError.

    Raises:
        ConfigError: there is no such run, its config is damaged, or it has no such domain.
    """
    section = raw.get(CONTINUE)
    values = {"run": section} if isinstance(section, str | Path) else section
    if not isinstance(values, Mapping) or not isinstance(values.get("run"), str | Path):
        # Nothing to continue, or a mistake that pydantic describes.
        return dict(raw)
    folder = _folder(values["run"])
    after = values.get("after")
    listed = _names(raw.get("domains"))
    earlier = _read_earlier(folder, raw, read, is_complete=after is not None and after in listed)
    if earlier is None:
        return dict(raw)
    names = _names(earlier.get("domains"))
    if after is None:
        after = names[-1]
    elif after not in names:
        raise ConfigError(f"{CONTINUE}.after: found {after}, allowed: a domain of {folder}, {', '.join(names)}")
    num_earlier = names.index(after) + 1
    inherited = {key: value for key, value in earlier.items() if key not in OWN_KEYS}
    if num_earlier < len(names):
        inherited["data"] = _without_tokens_of(names[num_earlier:], inherited.get("data", {}))
    own = {**raw, CONTINUE: {**values, "run": str(folder), "after": after}}
    if isinstance(raw.get("domains"), list) and listed[:num_earlier] != names[:num_earlier]:
        own["domains"] = [_with_steps(domain, earlier) for domain in earlier["domains"][:num_earlier]] + raw["domains"]
    return _merge(inherited, own)


def _read_earlier(
    folder: Path, raw: Mapping[str, Any], read: Callable[[Path], Mapping[str, Any]], *, is_complete: bool
) -> Mapping[str, Any] | None:
    """Values of the earlier run, or those that this run took from it at its first start.

    None where the former are gone or damaged, and `is_complete` tells that they are not needed.
    """
    path = folder / RECORDED_CONFIG
    damage: ConfigError | None = None
    if path.exists():
        try:
            return read(path)
        except ConfigError as error:
            damage = error
    # Where they are still needed, a damaged config is a better message than the keys that are missing without it.
    if is_complete and (damage is None or "model" in raw):
        return None
    output_dir = raw.get("output_dir")
    if isinstance(output_dir, str | Path) and (own := _folder(output_dir) / RECORDED_CONFIG).exists():
        recorded = read(own)
        section = recorded.get(CONTINUE) or {}
        names = _names(recorded.get("domains"))
        if section.get("run") == str(folder) and section.get("after") in names:
            return {**recorded, "domains": recorded["domains"][: names.index(section["after"]) + 1]}
    if damage is not None:
        raise ConfigError(f"{CONTINUE}.run: {damage}")
    found = "no such folder" if not folder.is_dir() else f"no {RECORDED_CONFIG} in it"
    raise ConfigError(f"{CONTINUE}.run: {folder}: found {found}, expected the folder of the run to continue")


def _without_tokens_of(domains: Sequence[str], data: Mapping[str, Any]) -> dict[str, Any]:
    added = data.get("add_tokens") or {}
    return {**data, "add_tokens": {name: tokens for name, tokens in added.items() if name not in domains}}


def _with_steps(domain: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """A domain with its length in steps, which follows from sections that may differ now; epochs need the text."""
    train = earlier.get("train", {})
    if domain.get("epochs") is not None or domain.get("steps") is not None:
        return dict(domain)
    steps = train.get("steps_per_domain")
    if domain.get("tokens") is not None:
        steps = -(-domain["tokens"] // (train["global_batch_size"] * earlier["data"]["sequence_length"]))
    return {**domain, "steps": steps, "tokens": None}


def _folder(text: str | Path) -> Path:
    try:
        return Path(expand_path(str(text)))
    except ValueError as error:
        raise ConfigError(f"{CONTINUE}.run: {error}") from None


def _names(domains: Any) -> list[str]:
    if not isinstance(domains, list):
        return []
    return [str(domain.get("name")) for domain in domains if isinstance(domain, Mapping)]


def _merge(earlier: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Own values, and those of `earlier` where a key is missing; a method of another name replaces all of its keys."""
    merged = dict(earlier)
    for key, value in own.items():
        before = earlier.get(key)
        if key == "method" and isinstance(value, str):
            value = {"name": value}
        merged[key] = value
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            is_other_method = key == "method" and value.get("name", before.get("name")) != before.get("name")
            merged[key] = dict(value) if is_other_method else _merge(before, value)
    return merged
