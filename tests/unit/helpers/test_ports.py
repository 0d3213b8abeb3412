"""Ports that belong to one test process."""

from __future__ import annotations

import socket
from datetime import timedelta

from torch.distributed import TCPStore

from helpers.ports import reserve_port


def test_reserve_port_is_given_to_nobody_who_asks_for_any() -> None:
    port = reserve_port()
    others = []
    try:
        for _ in range(2000):
            other = socket.socket()
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("", 0))
            others.append(other)
        assert port not in [other.getsockname()[1] for other in others]
    finally:
        for other in others:
            other.close()


def test_reserve_port_lets_torchs_store_listen() -> None:
    port = reserve_port()
    store = TCPStore("127.0.0.1", port, 2, is_master=True, timeout=timedelta(seconds=60), wait_for_workers=False)
    store.set("key", "value")
    assert store.port == port and store.get("key") == b"value"
