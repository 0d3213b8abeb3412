"""TCP ports that are this process' own until a rank listens there."""

from __future__ import annotations

import socket
from collections import deque

_held: deque[socket.socket] = deque(maxlen=256)


def reserve_port() -> int:
    """A port that the system gives to no other process, however many test processes ask at once.

    A socket that is bound, does not listen and allows its address to be used again keeps the port from being handed
    out, while a server that asks for it by number, and allows the same, as torch's store does, can listen there. The
    newest 256 are held.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("", 0))
    _held.append(holder)
    return int(holder.getsockname()[1])
