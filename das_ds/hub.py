"""Hugging Face hub: resolves a name to a commit, and to a local folder with the files of a model.

The hub is asked with a timeout of `HF_HUB_ETAG_TIMEOUT` seconds (10). If it does not answer, this process does not ask
again, as with `HF_HUB_OFFLINE=1`, and uses the local cache of the hub's client.
"""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils._validators import validate_repo_id

Kind = Literal["model", "dataset"]

COMMIT = re.compile(r"[0-9a-f]{40}")
NOUNS: dict[Kind, tuple[str, str]] = {"model": ("folder", "model"), "dataset": ("file", "dataset")}
"""Kind -> what such a name refers to locally, and on the hub."""
SMALL_FILES = re.compile(r"[^/]+\.(json|txt|model|jinja|tiktoken)")
"""Files of config and tokenizer."""
WEIGHTS = (re.compile(r"model(-\d+-of-\d+)?\.safetensors"), re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin"))
"""Formats of weights in order of preference."""
_gave_up = False
"""Whether this process, and not its user, stopped asking the hub."""


class HubError(OSError):
    """A name that refers to nothing, or a hub that does not answer; callers add the config key."""


def is_local_path(name: str) -> bool:
    """Whether a name is an existing local path; False also for names that no path can have, such as very long ones."""
    try:
        return Path(name).exists()
    except OSError:
        return False


def find_commit(kind: Kind, name: str, revision: str | None = None) -> str:
    """The commit (40 hexadecimal digits) that a revision of a model or dataset currently refers to.

    Args:
        kind: model or dataset.
        name: `owner/name`, or one of the hub's few names without an owner.
        revision: branch, tag or commit; None: the default branch. A full commit is returned without asking the hub.

    Raises:
        HubError: the hub has no such model or dataset, or does not answer and the cache does not have it.
    """
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    reference = _cache_folder(kind, name) / "refs" / (revision or constants.DEFAULT_REVISION)
    info = _query_hub(kind, name, revision)
    if info is None:
        commit = reference.read_text().strip() if reference.is_file() else None
        if commit is None:
            raise HubError(
                f"{_describe_missing(kind)} does not answer, and its cache has no copy ({constants.HF_HUB_CACHE})"
            )
        _print_on_rank_0(f"{name}: the hub does not answer; using the copy in its cache, commit {commit}")
        return commit
    # As the hub's client does for its downloads, so that the next start works without the hub.
    with suppress(OSError):
        reference.parent.mkdir(parents=True, exist_ok=True)
        partial = reference.with_name(f"{reference.name}.{os.getpid()}")
        partial.write_text(info.sha)
        partial.replace(reference)
    return str(info.sha)


def resolve_model_folder(name: str, revision: str | None = None, *, weights: bool = False) -> str:
    """The folder with config and tokenizer of a model, and its weights on request: `name` itself or a cache folder.

    Args:
        name: folder, or name on the hub.
        revision: of a model on the hub; None: its default branch.
        weights: download the weights too.

    Raises:
        HubError: neither such a folder nor such a model exists, or the model cannot be downloaded.
    """
    if is_local_path(name):
        if revision is not None:
            raise HubError(f"found revision {revision!r} with a local folder, which has none; expected null")
        return name
    return _download_snapshot(name, find_commit("model", name, revision), weights)


@cache
def _download_snapshot(name: str, commit: str, weights: bool) -> str:
    folder = _cache_folder("model", name) / "snapshots" / commit
    try:
        info = _query_hub("model", name, commit)
    except HubError:
        # A local copy is enough; the hub may have deleted the model since.
        if not folder.is_dir():
            raise
        info = None
    if info is None:
        if not folder.is_dir():
            raise HubError(
                f"{_describe_missing('model')} does not answer, and its cache has no copy of commit {commit}"
            )
        return str(folder)
    names = [entry.rfilename for entry in info.siblings or []]
    selected = [file for file in names if SMALL_FILES.fullmatch(file)]
    if weights:
        files_by_format = [[file for file in names if pattern.fullmatch(file)] for pattern in WEIGHTS]
        selected += next((files for files in files_by_format if files), [])
    try:
        return snapshot_download(name, revision=commit, allow_patterns=selected)
    # The client passes on any error of its HTTP and download libraries.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise HubError(f"commit {commit} cannot be downloaded from {constants.ENDPOINT}: {reason}") from error


@cache
def _query_hub(kind: Kind, name: str, revision: str | None) -> Any:
    """The hub's information about a name; None: the hub does not answer."""
    local_noun, hub_noun = NOUNS[kind]
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise HubError(f"found no such {local_noun}, and no {hub_noun} of the hub can have that name") from error
    if constants.HF_HUB_OFFLINE:
        return None
    if revision is None or not COMMIT.fullmatch(revision):
        _print_on_rank_0(
            f"{name}: no such {local_noun} here; asking {constants.ENDPOINT} for a {hub_noun} of that name"
        )
    try:
        timeout = float(constants.HF_HUB_ETAG_TIMEOUT)
        return HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=timeout)
    except RevisionNotFoundError as error:
        raise HubError(f"the {hub_noun} of the hub has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise HubError(f"{_describe_missing(kind)} has no {hub_noun} of that name that is open to you") from error
    # Any other error of its HTTP library means that the hub is unreachable.
    except Exception as error:
        _print_on_rank_0(f"{name}: {constants.ENDPOINT} does not answer ({type(error).__name__})")
        global _gave_up
        _gave_up = True
        constants.HF_HUB_OFFLINE = True
        return None


def allow_requests() -> bool:
    """Let the hub's client send requests again after it was not answered; False: `HF_HUB_OFFLINE` forbids them."""
    global _gave_up
    if _gave_up:
        _gave_up = False
        constants.HF_HUB_OFFLINE = False
    return not constants.HF_HUB_OFFLINE


def _describe_missing(kind: Kind) -> str:
    """Beginning of an error about a name that is not a local path."""
    return f"found no such {NOUNS[kind][0]}, and the hub ({constants.ENDPOINT})"


def _cache_folder(kind: Kind, name: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"


def _print_on_rank_0(text: str) -> None:
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print(f"das_ds: {text}", file=sys.stderr, flush=True)
