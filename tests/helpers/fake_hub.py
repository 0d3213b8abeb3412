"""A hub on this machine: the requests of the real client for a model or data set, at one commit each."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import constants

from das_ds.config import RunConfig
from das_ds.distributed.process_group import init_process_group
from das_ds.models.loading import weights_folder
from das_ds.training.revisions import pin_revisions


class FakeHub:
    """Repositories by kind and name; may be changed while it serves.

    Args:
        endpoint: its address.
    """

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.requests: list[str] = []
        """Paths that were asked for."""
        self._repositories: dict[tuple[str, str], tuple[str, Path]] = {}

    def put(self, kind: str, name: str, commit: str, folder: Path) -> None:
        """Have `name` (kind models or datasets) be the files of a folder, as commit `commit`, in all its branches."""
        self._repositories[(kind, name)] = (commit, folder)

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        self.requests.append(path)
        for (kind, name), (commit, folder) in self._repositories.items():
            files = {file.name: file for file in folder.iterdir()}
            base = f"/api/{kind}/{name}"
            if path.startswith(f"{base}/tree/"):
                entries = [
                    {"type": "file", "path": file, "size": at.stat().st_size, "oid": _digest(at)}
                    for file, at in files.items()
                ]
                return 200, {}, json.dumps(entries).encode()
            if path == base or path.startswith(f"{base}/revision/"):
                revision = path.removeprefix(base).removeprefix("/revision/")
                if revision == "gone":
                    return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
                siblings = [{"rfilename": file} for file in files]
                info = {"id": name, "sha": commit, "siblings": siblings, "tags": [], "private": False, "downloads": 0}
                return 200, {}, json.dumps(info).encode()
            prefix = f"/{name}/resolve/"
            if path.startswith(prefix) and (file := files.get(path.rpartition("/")[2])) is not None:
                return 200, {"ETag": f'"{_digest(file)}"', "X-Repo-Commit": commit}, file.read_bytes()
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"

    def receive(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a request that changes something."""
        self.requests.append(f"{method} {path}")
        return 403, {}, b"{}"


Hub = TypeVar("Hub", bound=FakeHub)


@contextmanager
def fake_hub(kind: type[Hub] = FakeHub) -> Iterator[Hub]:  # type: ignore[assignment]
    """Serves until the end of the block, after which its address refuses connections."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(hub.answer(self.path.partition("?")[0]))

        def do_HEAD(self) -> None:
            self._send(hub.answer(self.path.partition("?")[0]), is_head=True)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._send(hub.receive(self.command, self.path.partition("?")[0], body))

        def do_DELETE(self) -> None:
            self.do_POST()

        def _send(self, answer: tuple[int, dict[str, str], bytes], *, is_head: bool = False) -> None:
            status, headers, body = answer
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if not is_head:
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = kind(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def pin_on_rank(values: dict[str, Any], endpoint: str, cache: str, only_rank_0: bool) -> tuple[RunConfig, str, bool]:
    """Config that a run continues with, folder of its weights, and whether this rank sends the hub no more requests.

    Args:
        values: config of the run, whose folder is there.
        endpoint: address of the hub.
        cache: folder of its client's cache.
        only_rank_0: others find nothing at that address.
    """
    ranks = init_process_group()
    point_to(endpoint if ranks.info.is_main or not only_rank_0 else "http://127.0.0.1:1")
    constants.HF_HUB_CACHE = cache
    constants.HF_HUB_OFFLINE = False
    config = pin_revisions(RunConfig(**values), ranks)
    (folder,) = ranks.main_process_first(lambda: (weights_folder(config.model),))
    return config, str(folder), constants.HF_HUB_OFFLINE


def point_to(endpoint: str) -> None:
    """Have the hub's client of this process ask there."""
    constants.ENDPOINT = endpoint
    constants.HUGGINGFACE_CO_URL_TEMPLATE = endpoint + "/{repo_id}/resolve/{revision}/{filename}"


def _digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
