"""A hub on this machine that takes uploads: repositories with commits and tags, as the real client makes them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

from helpers.fake_hub import FakeHub

Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Repository:
    """One repository."""

    private: bool
    commits: list[tuple[str, str, dict[str, bytes]]] = field(default_factory=list)
    """(commit, message, file -> content) from the first to the newest."""
    tags: dict[str, str] = field(default_factory=dict)
    """Tag -> commit."""

    @property
    def head(self) -> str:
        """The newest commit."""
        return self.commits[-1][0]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Files of a tag, or of the main branch."""
        commit = self.tags.get(revision, self.head)
        return next(files for found, _, files in self.commits if found == commit)


class WritableHub(FakeHub):
    """Serves an account `owner` that may write, also for the organization `lab`."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint)
        self.repositories: dict[str, Repository] = {}
        self.account: dict[str, Any] = {"name": "owner", "orgs": [{"name": "lab"}]}
        self.failures = 0
        """Requests to change something that are still refused."""
        self.refuses_token = False

    def answer(self, path: str) -> Answer:
        """See `FakeHub`."""
        self.requests.append(path)
        if path == "/api/whoami-v2":
            return (401, {}, b"{}") if self.refuses_token else _json(self.account)
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/refs|/revision/[^/]+|/tree/[^/]+)?", path)
        if found is None or found[1] not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        repository = self.repositories[found[1]]
        if found[2] == "/refs":
            tags = [{"name": tag, "ref": tag, "targetCommit": commit} for tag, commit in repository.tags.items()]
            return _json({"branches": [], "converts": [], "tags": tags})
        if found[2] is not None and found[2].startswith("/tree/"):
            files = repository.files().items()
            return _json([{"type": "file", "path": n, "size": len(c), "oid": _blob(c)} for n, c in files])
        siblings = [{"rfilename": name} for name in repository.files()]
        return _json({"id": found[1], "sha": repository.head, "siblings": siblings, "tags": [], "private": True})

    def receive(self, method: str, path: str, body: bytes) -> Answer:
        """See `FakeHub`."""
        self.requests.append(f"{method} {path}")
        if self.failures:
            self.failures -= 1
            return 403, {}, b"{}"
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|tag)/([^/]+)", path)
        if found is None:
            return 404, {}, b"{}"
        repository = self.repositories[found[1]]
        if found[2] == "preupload":
            return _upload_modes(repository.files(), json.loads(body))
        if found[2] == "commit":
            return self._commit(found[1], body)
        if method == "DELETE":
            del repository.tags[found[3]]
        else:
            repository.tags[json.loads(body)["tag"]] = found[3]
        return _json({})

    def _create(self, wanted: dict[str, Any]) -> Answer:
        name = f"{wanted.get('organization') or self.account['name']}/{wanted['name']}"
        url = {"url": f"{self.endpoint}/{name}", "name": name}
        if name in self.repositories:
            return 409, {}, json.dumps(url).encode()
        repository = Repository(private=wanted.get("private", wanted.get("visibility") == "private"))
        repository.commits.append((_digest("first"), "initial commit", {".gitattributes": b""}))
        self.repositories[name] = repository
        return _json(url)

    def _commit(self, name: str, body: bytes) -> Answer:
        repository = self.repositories[name]
        lines = [json.loads(line) for line in body.splitlines()]
        files = dict(repository.files())
        message = next(line["value"]["summary"] for line in lines if line["key"] == "header")
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = _digest(f"{len(repository.commits)} {message}")
        repository.commits.append((commit, message, files))
        return _json({"commitUrl": f"{self.endpoint}/{name}/commit/{commit}", "commitOid": commit, "success": True})


def _upload_modes(known: dict[str, bytes], wanted: dict[str, Any]) -> Answer:
    """How each file is to be sent: within the commit; with git's name of the content that is there."""
    files = [
        {
            "path": entry["path"],
            "uploadMode": "regular",
            "shouldIgnore": False,
            "oid": _blob(known[entry["path"]]) if entry["path"] in known else None,
        }
        for entry in wanted["files"]
    ]
    return _json({"files": files})


def _json(content: Any) -> Answer:
    return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()


def _digest(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


def _blob(content: bytes) -> str:
    """Git's name of a file's content, by which the client recognizes files that it need not send."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
