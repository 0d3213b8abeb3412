"""Names on the Hugging Face hub: the commit that a name stands for, and a local folder with the files of a model.

The hub is asked once, with a timeout of `HF_HUB_ETAG_TIMEOUT` seconds (10). Where it does not answer, this process
asks it nothing more, as with `HF_HUB_OFFLINE=1`, and what the cache of the hub's client holds is used.
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
WORDS: dict[Kind, tuple[str, str]] = {"model": ("folder", "model"), "dataset": ("file", "dataset")}
"""What a name may stand for here, and on the hub."""
SMALL_FILES = re.compile(r"[^/]+\.(json|txt|model|jinja|tiktoken)")
"""Config and tokenizer."""
WEIGHTS = (re.compile(r"model(-\d+-of-\d+)?\.safetensors"), re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin"))
"""The first form that a model has is read."""


class HubError(OSError):
    """A name that stands for nothing, or a hub that does not answer; callers say which key it is of."""


def is_local_path(name: str) -> bool:
    """Whether a name is a path of this machine; one that no path can have, such as a long one, is not."""
    try:
        return Path(name).exists()
    except OSError:
        return False


def find_commit(kind: Kind, name: str, revision: str | None = None) -> str:
    """The commit, 40 hexadecimal digits, that a revision of a model or dataset is now.

    Args:
        kind: what the name stands for.
        name: `owner/name`, or one of the hub's few names without an owner.
        revision: branch, tag or commit; None: the default branch. A whole commit is given back unasked.

    Raises:
        HubError: the hub has no such thing, or does not answer and the cache does not know it.
    """
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    reference = _cache_folder(kind, name) / "refs" / (revision or constants.DEFAULT_REVISION)
    info = _asked(kind, name, revision)
    if info is None:
        commit = reference.read_text().strip() if reference.is_file() else None
        if commit is None:
            raise HubError(f"{_nothing(kind)} does not answer, and its cache has no copy ({constants.HF_HUB_CACHE})")
        _say(f"{name}: the hub does not answer; the copy in its cache is used, commit {commit}")
        return commit
    # As the hub's client does for what it loads, so that the next start can do without the hub.
    with suppress(OSError):
        reference.parent.mkdir(parents=True, exist_ok=True)
        partial = reference.with_name(f"{reference.name}.{os.getpid()}")
        partial.write_text(info.sha)
        partial.replace(reference)
    return str(info.sha)


def resolve_model_folder(name: str, revision: str | None = None, *, weights: bool = False) -> str:
    """A folder with config and tokenizer of a model, and its weights if wanted: the name itself, or one in the cache.

    Args:
        name: folder, or name on the hub.
        revision: of the hub's model; None: its default branch.
        weights: whether weights are needed too.

    Raises:
        HubError: there is neither such a folder nor such a model, or it cannot be fetched.
    """
    if is_local_path(name):
        if revision is not None:
            raise HubError(f"found revision {revision!r} with a folder of this machine, which has none; expected null")
        return name
    return _fetched(name, find_commit("model", name, revision), weights)


@cache
def _fetched(name: str, commit: str, weights: bool) -> str:
    folder = _cache_folder("model", name) / "snapshots" / commit
    try:
        info = _asked("model", name, commit)
    except HubError:
        # What is here needs no hub, which may have lost it meanwhile.
        if not folder.is_dir():
            raise
        info = None
    if info is None:
        if not folder.is_dir():
            raise HubError(f"{_nothing('model')} does not answer, and its cache has no copy of commit {commit}")
        return str(folder)
    names = [entry.rfilename for entry in info.siblings or []]
    wanted = [file for file in names if SMALL_FILES.fullmatch(file)]
    if weights:
        forms = [[file for file in names if form.fullmatch(file)] for form in WEIGHTS]
        wanted += next((files for files in forms if files), [])
    try:
        return snapshot_download(name, revision=commit, allow_patterns=wanted)
    # The client passes on the errors of its HTTP and download libraries.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise HubError(f"commit {commit} cannot be fetched from {constants.ENDPOINT}: {reason}") from error


@cache
def _asked(kind: Kind, name: str, revision: str | None) -> Any:
    """What the hub says of a name; None: no answer."""
    here, there = WORDS[kind]
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise HubError(f"found no such {here}, and no {there} of the hub can have that name") from error
    if constants.HF_HUB_OFFLINE:
        return None
    if revision is None or not COMMIT.fullmatch(revision):
        _say(f"{name}: no such {here} here; asking {constants.ENDPOINT} for a {there} of that name")
    try:
        timeout = float(constants.HF_HUB_ETAG_TIMEOUT)
        return HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=timeout)
    except RevisionNotFoundError as error:
        raise HubError(f"the {there} of the hub has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise HubError(f"{_nothing(kind)} has no {there} of that name that is open to you") from error
    # Whatever else its HTTP library raises means that it cannot be asked.
    except Exception as error:
        _say(f"{name}: {constants.ENDPOINT} does not answer ({type(error).__name__})")
        constants.HF_HUB_OFFLINE = True
        return None


def _nothing(kind: Kind) -> str:
    return f"found no such {WORDS[kind][0]}, and the hub ({constants.ENDPOINT})"


def _cache_folder(kind: Kind, name: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"


def _say(text: str) -> None:
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print(f"das_ds: {text}", file=sys.stderr, flush=True)
