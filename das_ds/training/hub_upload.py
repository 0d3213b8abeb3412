"""Upload of an exported model to the Hugging Face hub: where it goes, whether it may, and the upload itself."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from das_ds.config import RunConfig
from das_ds.errors import ConfigError, first_line
from das_ds.hub import allow_requests
from das_ds.storage import CHECKSUM_FILE, VersionedJson, checksum

STALE_FILES = ("*.safetensors", "*.safetensors.index.json")
"""Files of an earlier model that are removed where the new one does not have them."""


@dataclass(frozen=True)
class HubTarget:
    """Where one model goes."""

    repo_id: str
    tag: str | None
    """Of the commit; None: the repository has this model alone."""

    @property
    def url(self) -> str:
        """For readers."""
        tree = "" if self.tag is None else f"/tree/{self.tag}"
        return f"{constants.ENDPOINT}/{self.repo_id}{tree}"

    def commands(self, folder: Path, *, private: bool) -> str:
        """What to type to upload a model by hand."""
        visibility = " --private" if private else ""
        upload = f"hf upload {self.repo_id} {shlex.quote(str(folder))} .{visibility}"
        return upload if self.tag is None else f"{upload} && hf repos tag create {self.repo_id} {self.tag}"


class HubRecord(VersionedJson):
    """What was uploaded of a domain's model, in its folder."""

    what: ClassVar[str] = "the record of an upload"
    format_version: Literal[1] = 1
    """Version of this format."""
    repo_id: str
    tag: str | None
    commit: str
    files: str
    """Checksum of the model's file of checksums."""

    def is_of(self, target: HubTarget, folder: Path) -> bool:
        """Whether this model is there already."""
        return (self.repo_id, self.tag, self.files) == (target.repo_id, target.tag, checksum(folder / CHECKSUM_FILE))


def hub_target(config: RunConfig, stage: str) -> HubTarget:
    """Where the model of a stage, by its name, goes; `export.push_to_hub` has to be on."""
    repo_id = config.export.hub_model_id
    assert repo_id is not None, "checked by the config"
    if config.export.hub_layout == "tags":
        return HubTarget(repo_id, stage)
    return HubTarget(f"{repo_id}-{stage}", None)


def check_hub_names(config: RunConfig) -> None:
    """Check, without asking the hub, that it allows the names of all repositories.

    Raises:
        ConfigError: it does not.
    """
    for stage in config.stage_names:
        repo_id = hub_target(config, stage).repo_id
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise ConfigError(
                f"export.hub_model_id: found {config.export.hub_model_id}, but the hub allows no repository "
                f"{repo_id}: {first_line(error)}"
            ) from error


def find_account(config: RunConfig) -> str | None:
    """The account that the token belongs to, which may write to the repositories; None: the hub does not answer.

    Raises:
        ConfigError: no token, one that the hub refuses or that may only read, or one of an account without the owner of
            the repositories.
    """
    if get_token() is None:
        raise ConfigError("export.push_to_hub: found no token; set HF_TOKEN, or log in with: hf auth login")
    if not allow_requests():
        return None
    try:
        account: dict[str, Any] = HfApi().whoami()
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise ConfigError(
                f"export.push_to_hub: found a token that {constants.ENDPOINT} refuses; set another HF_TOKEN, or log in "
                "with: hf auth login"
            ) from error
        return None
    # Any error of its HTTP library means that the hub is unreachable.
    except Exception:
        return None
    name = str(account["name"])
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ConfigError(f"export.push_to_hub: found a token of {name} that only reads, expected one that may write")
    owners = [name, *(str(organization["name"]) for organization in account.get("orgs", []))]
    owner = str(config.export.hub_model_id).partition("/")[0]
    if owner not in owners:
        raise ConfigError(
            f"export.hub_model_id: found owner {owner}, but the token is of {name}; allowed: {', '.join(owners)}"
        )
    return name


def push_model(folder: Path, target: HubTarget, message: str, *, private: bool) -> HubRecord:
    """Upload a model, in place of the one that the main branch has; complete once its tag is set.

    Nothing is uploaded again that the repository has.

    Args:
        folder: exported model.
        target: where it goes; created where it does not exist.
        message: of the commit.
        private: whether a new repository is private.

    Raises:
        OSError, HfHubHTTPError: no access, no network, a file that cannot be read; its libraries may raise others.
    """
    if not allow_requests():
        raise OSError("HF_HUB_OFFLINE is set")
    api = HfApi()
    files = checksum(folder / CHECKSUM_FILE)
    api.create_repo(target.repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=target.repo_id, folder_path=folder, commit_message=message, delete_patterns=list(STALE_FILES)
    )
    if target.tag is not None:
        _set_tag(api, target.repo_id, target.tag, commit.oid)
    return HubRecord(repo_id=target.repo_id, tag=target.tag, commit=commit.oid, files=files)


def _set_tag(api: HfApi, repo_id: str, tag: str, commit: str) -> None:
    """Have a tag be at this commit, also where an earlier model of the domain has it."""
    tags = {reference.name: reference.target_commit for reference in api.list_repo_refs(repo_id).tags}
    if tags.get(tag) == commit:
        return
    if tag in tags:
        api.delete_tag(repo_id, tag=tag)
    api.create_tag(repo_id, tag=tag, revision=commit)
