"""Two hosts on this machine: network namespaces joined by one cable, which can be pulled."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

from helpers.commands import QUICK_START, ROOT

INTERFACE = "cable"
ADDRESSES = ("10.213.7.1", "10.213.7.2")


def missing_requirement() -> str | None:
    """Why there can be no two hosts here; None: there can."""
    if shutil.which("ip") is None:
        return "needs the command ip (iproute2)"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    try:
        with two_hosts():
            return None
    except RuntimeError as error:
        return f"needs network namespaces and veth pairs: {error}"


class TwoHosts:
    """Starts a rank on each of two namespaces; nothing but the cable is between them."""

    def __init__(self, names: tuple[str, str]) -> None:
        self._names = names

    def plug(self, *, in_: bool) -> None:
        """Put the cable in, or pull it."""
        ip("-n", self._names[1], "link", "set", INTERFACE, "up" if in_ else "down")

    def start(self, rank: int, log: IO[bytes], *words: object, port: int) -> subprocess.Popen[bytes]:
        """A Python program as one of two ranks, in the repository, with rank 0 on the first host."""
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": ADDRESSES[0],
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "PYTHONPATH": str(ROOT),
        }
        command = ["ip", "netns", "exec", self._names[rank], sys.executable, *map(str, words)]
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | QUICK_START | environment, stdout=log, stderr=log)


@contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """Two namespaces that reach each other by `ADDRESSES`; gone at the end of the block.

    Raises:
        RuntimeError: this machine does not allow it.
    """
    prefix = f"das-ds-{secrets.token_hex(4)}"
    names = (f"{prefix}-0", f"{prefix}-1")
    try:
        for name in names:
            ip("netns", "add", name)
        ends = [part for name in names for part in ("name", INTERFACE, "netns", name)]
        ip("link", "add", *ends[:4], "type", "veth", "peer", *ends[4:])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", INTERFACE, "up")
        yield TwoHosts(names)
    finally:
        for name in names:
            with suppress(RuntimeError):
                ip("netns", "delete", name)


def ip(*words: str) -> None:
    """The command `ip`.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
