"""The run config that `das-ds init` writes: the keys that every run sets, with comments."""

from __future__ import annotations

import re
from collections.abc import Sequence
from glob import escape, glob
from pathlib import Path
from typing import Any

import yaml

from das_ds.config.io import load_config, parse_config
from das_ds.config.method import load_methods
from das_ds.data.sources import FILE_SUFFIXES, parse_hub_name
from das_ds.errors import ConfigError, DataError, ModelError, RunFolderError

PLAIN = re.compile(r"(?:[A-Za-z/]|\.\.?/)[\w./*-]*")
"""Text that YAML reads as it is, unless it is a word such as `yes`."""

LOCAL = ("/", "./", "../", "~")
"""What no hub name begins with."""

TRAIN = "train"
VALID = "valid"
PARTS = {TRAIN: TRAIN, VALID: VALID, "validation": VALID, "dev": VALID, "test": "test"}
"""Name of a file without its suffix -> its part of a corpus."""

TEMPLATE = """\
# Run config, to be adapted. `das-ds train --help` explains every key, `--help train` those of one section.
output_dir: {output_dir}   # new, empty, or that of the same run, which then resumes
model:
  name_or_path: {model}
domains:   # in the order of learning
{domains}
{general}
data:
  sequence_length: 128   # tokens per block; packed from whole documents
train:
  steps_per_domain: 1000
  global_batch_size: 256   # sequences per step, over all GPUs
  micro_batch_size: 32   # sequences per GPU at once; lower it if memory is short
  learning_rate: 1e-4
  precision: bf16   # fp32 on CPUs, which only emulate it
method: {method}   # `das-ds methods` lists all; ncl trains without protection, for comparison
deepspeed: zero2   # zero0 to zero3, zero2_offload, zero3_offload, or a DeepSpeed file of your own
tracking: []   # beside metrics.jsonl: wandb, tensorboard, mlflow, trackio
"""


def write_new_config(
    path: Path, model: str, domains: Sequence[str], general: str | None, method: str | None = None
) -> list[str]:
    """Write a valid run config with comments.

    Args:
        path: of the file, which must not exist.
        model: folder or hub name.
        domains: NAME=PATH in the order of learning; a path is a folder of text, a file, a glob or a hub data set. Of a
            folder that is divided into `train` and `valid` files, each has its own use.
        general: path of text that is only evaluated; None: none.
        method: its name; None: the first choice.

    Returns:
        Paths that were taken as hub data sets, because nothing is there on this machine.

    Raises:
        ConfigError: a domain is no NAME=PATH, or a name or the method is not allowed.
        ModelError: a model that can be neither a folder nor a hub name.
        DataError: there is no text at a path.
        RunFolderError: the file exists or cannot be written.
    """
    method = method or load_methods().FIRST_CHOICE
    _check_model(model)
    sources = [(name, *_find_corpus(source)) for name, source in map(_split, domains)]
    general_text = None if general is None else _find_held_out(general)
    values: dict[str, Any] = {
        "output_dir": f"runs/{path.stem}",
        "model": {"name_or_path": model},
        "domains": [{"name": name, "train": train, "valid": valid} for name, train, valid in sources],
        "method": method,
    }
    if general_text is not None:
        values["general"] = {"name": "general", "valid": general_text}
    # Before anything is written; the rest of the file has no values of the user.
    parse_config(values, [])
    text = TEMPLATE.format(
        output_dir=_quote(values["output_dir"]),
        model=_quote(model),
        domains="\n".join(_corpus("- ", name, train=train, valid=valid) for name, train, valid in sources),
        general=_general(general_text),
        method=method,
    )
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RunFolderError(f"--output {path}: found a file there, expected a new one") from None
    except OSError as error:
        raise RunFolderError(f"--output {path}: cannot be written ({error.strerror})") from error
    load_config(path)
    every = [source for _, train, _ in sources for source in train] + (general_text or [])
    return [source for source in every if not _is_local(source)]


def _split(argument: str) -> tuple[str, str]:
    name, equals, source = argument.partition("=")
    if not equals or not name or not source:
        raise ConfigError(f"--domain: found {argument!r}, expected NAME=PATH, such as acl=corpora/acl")
    return name, source


def _check_model(model: str) -> None:
    """Hub names are not asked for: the next command does so, and here there may be no network."""
    path = Path(model).expanduser()
    if not model or (model.startswith(LOCAL) and not path.exists()):
        raise ModelError(f"--model: found {model!r}, expected a folder that exists or a hub name")
    if path.exists() and not (path / "config.json").is_file():
        raise ModelError(f"--model: found {model} without config.json, expected the folder of a model or a hub name")


def _find_text(source: str) -> list[str]:
    """Sources as a config has them: for a folder, a glob for each kind of text files anywhere in it."""
    path = Path(source).expanduser()
    if not path.is_dir():
        if not _is_local(source) and parse_hub_name(source) is None:
            raise DataError(f"{source}: found no such file or folder, expected text, a glob or a hub name")
        return [source]
    kinds = [suffix for suffix in FILE_SUFFIXES if any(file.name.endswith(suffix) for file in _text_files(path))]
    if not kinds:
        endings = ", ".join(FILE_SUFFIXES)
        raise DataError(f"{source}: found no text in this folder, expected files that end in {endings}")
    return [f"{source.rstrip('/')}/**/*{suffix}" for suffix in kinds]


def _is_local(source: str) -> bool:
    """Whether a source is a glob, or names something on this machine."""
    return Path(source).expanduser().exists() or any(character in source for character in "*?[$")


def _find_corpus(source: str) -> tuple[list[str], list[str]]:
    """Training and held-out text; none of the latter where a fraction of the former is held out."""
    files = _divided(source)
    train, valid = ([f"{source.rstrip('/')}/{file}" for file in files.get(part, [])] for part in (TRAIN, VALID))
    return (train, valid) if train else (_find_text(source), [])


def _find_held_out(source: str) -> list[str]:
    return _find_corpus(source)[1] or _find_text(source)


def _text_files(folder: Path) -> list[Path]:
    """Those that a glob of `_find_text` finds, sorted."""
    files = sorted(map(Path, glob(f"{escape(str(folder))}/**/*", recursive=True)))
    return [file for file in files if file.is_file() and file.name.endswith(FILE_SUFFIXES)]


def _divided(source: str) -> dict[str, list[str]]:
    """Part (train, valid, test) -> names of its files in a folder; empty unless every file of text there is of one."""
    folder = Path(source).expanduser()
    parts: dict[str, list[str]] = {}
    for file in _text_files(folder):
        part = PARTS.get(file.name.partition(".")[0])
        if part is None or file.parent != folder:
            return {}
        parts.setdefault(part, []).append(file.name)
    return parts


def _corpus(bullet: str, name: str, **text: Sequence[str]) -> str:
    lines = [f"  {bullet}name: {_quote(name)}"]
    for key, sources in text.items():
        if sources:
            listed = ", ".join(map(_quote, sources))
            lines.append(f"  {' ' * len(bullet)}{key}: {f'[{listed}]' if len(sources) > 1 else listed}")
    return "\n".join(lines)


def _general(text: Sequence[str] | None) -> str:
    if text is None:
        return "# general: {name: general, valid: general.txt}   # evaluated, to see what is forgotten of general text"
    return "general:   # only evaluated\n" + _corpus("", "general", valid=text)


def _quote(text: str) -> str:
    """The text as YAML."""
    if PLAIN.fullmatch(text) and yaml.safe_load(text) == text:
        return text
    return yaml.safe_dump(text, default_style="'", width=10_000, allow_unicode=True).strip()
