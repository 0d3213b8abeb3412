"""Pinned revisions: commits of a run's hub models and data sets, recorded at its first start and used from then on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import constants

from das_ds.config import CorpusConfig, DomainConfig, RunConfig
from das_ds.data.sources import HUB_FORM, parse_hub_name
from das_ds.distributed.process_group import ProcessGroup
from das_ds.errors import DataError, ModelError, RunFolderError
from das_ds.hub import HubError, Kind, find_commit, is_local_path
from das_ds.run_dir import RunDir
from das_ds.storage import read_json_with_checksum, write_json_with_checksum

Commits = dict[str, str]
"""`model owner/name@revision` or `dataset owner/name@revision` -> commit."""
Find = Callable[[Kind, str, str | None], str | None]
AnyCorpus = TypeVar("AnyCorpus", bound=CorpusConfig)


def pin_revisions(config: RunConfig, ranks: ProcessGroup) -> RunConfig:
    """The config with the commit of everything that comes from the hub, equal on every rank and at every start.

    Raises:
        DasError: the hub has no such entry, or does not answer and it is not cached; or the record is corrupt.
    """
    recorded = ranks.run_on_main(lambda: _find_and_record(config))
    # If rank 0 cannot reach the hub, the other ranks do not try.
    commits, constants.HF_HUB_OFFLINE = ranks.all_gather_object((recorded, constants.HF_HUB_OFFLINE))[0]
    assert commits is not None, "rank 0 has the commits, or all ranks have raised"
    return _with_commits(config, lambda *name: commits[_key(*name)])


def with_recorded_revisions(config: RunConfig) -> RunConfig:
    """The config with the commits that its run folder records; unchanged if there is no record.

    Raises:
        RunFolderError: the record is corrupt.
    """
    commits = _read_record(RunDir(config.output_dir).revisions_file)
    return _with_commits(config, lambda *name: commits.get(_key(*name), name[2]))


def _find_and_record(config: RunConfig) -> Commits:
    path = RunDir(config.output_dir).revisions_file
    recorded = _read_record(path)
    # A run that continues another one continues from the same base model.
    earlier = {} if config.continue_from is None else _read_record(RunDir(config.continue_from.run).revisions_file)
    commits = Commits()

    def find(kind: Kind, name: str, revision: str | None) -> str:
        key = _key(kind, name, revision)
        commits[key] = recorded.get(key) or earlier.get(key) or _look_up(kind, name, revision)
        return commits[key]

    _with_commits(config, find)
    if commits and commits != recorded:
        try:
            write_json_with_checksum(path, commits)
        except OSError as error:
            raise RunFolderError(f"{path}: cannot be written ({error.strerror or error})") from error
    return commits


def _look_up(kind: Kind, name: str, revision: str | None) -> str:
    try:
        return find_commit(kind, name, revision)
    except HubError as error:
        if kind == "model":
            raise ModelError(f"{name}: {error}; expected a folder or the name of a model on the hub") from error
        raise DataError(f"{name}: {error}; expected a file, a glob with a match, or a hub name {HUB_FORM}") from error


def _read_record(path: Path) -> Commits:
    try:
        return read_json_with_checksum(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RunFolderError(
            f"{path}: {error}; restore an intact copy, or remove it to look the revisions up again"
        ) from error


def _key(kind: Kind, name: str, revision: str | None) -> str:
    return f"{kind} {name}@{revision or constants.DEFAULT_REVISION}"


def _with_commits(config: RunConfig, find: Find) -> RunConfig:
    """The config with every revision of the hub replaced by what `find` gives for it."""

    def corpus(one: AnyCorpus) -> AnyCorpus:
        changes: dict[str, Any] = {part: list(map(text, getattr(one, part))) for part in ("train", "valid")}
        if isinstance(one, DomainConfig):
            changes["sources"] = [
                source.model_copy(update={"train": list(map(text, source.train))}) for source in one.sources
            ]
        return one.model_copy(update=changes)

    def text(name: str) -> str:
        source = parse_hub_name(name)
        if source is None or (commit := find("dataset", source.repo, source.revision)) is None:
            return name
        return f"{source}#{commit}"

    model = config.model
    data = config.data
    changes: dict[str, Any] = {"domains": [corpus(domain) for domain in config.domains]}
    if model.name_or_path is not None and not is_local_path(model.name_or_path):
        commit = find("model", model.name_or_path, model.revision)
        changes["model"] = model.model_copy(update={"revision": commit})
    if data.tokenizer is not None and not is_local_path(data.tokenizer):
        commit = find("model", data.tokenizer, data.tokenizer_revision)
        changes["data"] = data.model_copy(update={"tokenizer_revision": commit})
    if config.general is not None:
        changes["general"] = corpus(config.general)
    changes["evaluate_on"] = [corpus(one) for one in config.evaluate_on]
    return config.model_copy(update=changes)
