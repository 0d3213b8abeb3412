"""The help texts that commands print: every config key with its allowed values, default and meaning."""

from __future__ import annotations

import json
import textwrap
from typing import Any

from das_ds.config.method import method_configs
from das_ds.config.schema import METHOD, ConfigKey, config_keys, method_keys, nearest_keys, table_key
from das_ds.errors import ConfigError

HELP_WIDTH = 120


def describe_config() -> str:
    """Every key that all runs have, with its allowed values, default and meaning, as the text of `--help`."""
    intro = (
        "Keys of the run config; `--help SECTION` prints those of one section. In a list of domains, 0 is the "
        "position; a list\nof one text may be written as that text. The other keys of `method` depend on its name: "
        "`das-ds methods` lists the\nmethods, `das-ds methods NAME` the keys of one."
    )
    return _table(intro, list(config_keys().values()))


def describe_section(section: str) -> str:
    """The keys of one section, or one key, as the text of `--help SECTION`.

    Args:
        section: dotted, such as `train` or `model.lora`.

    Raises:
        ConfigError: there is no such key.
    """
    rows = [row for row in config_keys().values() if f"{row.key}.".startswith(f"{table_key(section)}.")]
    if not rows:
        nearest = nearest_keys(section)
        sections = dict.fromkeys(row.key.partition(".")[0] for row in config_keys().values())
        hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"allowed: {', '.join(sections)}"
        raise ConfigError(f"--help {section}: found no such section; {hint}")
    other = " Its other keys depend on the method: `das-ds methods NAME`." if section == METHOD else ""
    return _table(f"Keys of {section}.{other}\n", rows)


def describe_method(name: str) -> str:
    """Every key of the section `method` for one method, as the text of `das-ds methods NAME`.

    Raises:
        ConfigError: unknown name.
    """
    configs = method_configs()
    if name not in configs:
        raise ConfigError(f"method.name: found {name!r}, allowed: {' | '.join(configs)}")
    return _table(f"{_summary(name)}\n", list(method_keys(name)))


def describe_methods() -> str:
    """Name and purpose of every method, as the text of `das-ds methods`."""
    names = list(method_configs())
    width = max(map(len, names)) + 2
    return "\n".join(f"{name:<{width}}{_summary(name)}" for name in names)


def _summary(method: str) -> str:
    """First line of the docstring of a method's config."""
    return str(method_configs()[method].__doc__).partition("\n")[0]


def _table(intro: str, rows: list[ConfigKey]) -> str:
    width = max(len(row.key) for row in rows) + 2
    return "\n".join([intro, *(_described(row, width) for row in rows)])


def _described(row: ConfigKey, width: int) -> str:
    lines = textwrap.wrap(row.meaning, HELP_WIDTH - width)
    if not row.is_section:
        value = f"{row.allowed}; {'required' if row.required else f'default {_plain(row.default)}'}"
        lines = textwrap.wrap(value, HELP_WIDTH - width) + lines
    gap = "\n" if row.is_section or not row.section else ""
    return f"{gap}{row.key:<{width}}" + f"\n{' ' * width}".join(lines)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
