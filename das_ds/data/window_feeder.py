"""Window feeder: a process beside training that makes the next windows of its streams and removes those it has passed.

It only saves time: who needs a window that is not there makes it (`TokenStream.require`). An error is therefore left to
training, which meets it when it comes to that window. The process ends with training, also if that is killed.
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import IO

from das_ds.data.stream_windows import StreamSpec, TokenStream, keep_ahead
from das_ds.errors import DasError

logger = logging.getLogger(__name__)

Windows = dict[str, int]
"""Name of a stream -> the window that training is at."""


class WindowFeeder:
    """Keeps windows ahead of training, in a process of its own.

    Args:
        specs: of the streams that are trained on.
    """

    def __init__(self, specs: list[StreamSpec]) -> None:
        self._specs = specs
        self._windows: Windows = {}
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        # A new interpreter, and no fork: that of a process with threads, or with a GPU, may hang.
        return subprocess.Popen(
            [sys.executable, "-m", "das_ds.data.window_feeder"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        )

    def advance(self, windows: Mapping[str, int]) -> None:
        """Tell where training is."""
        if windows == self._windows:
            return
        if not self._windows:
            self._send((self._specs, dict(windows)))
        elif self._process.poll() is not None:
            # It was killed, perhaps for want of memory; training made its windows itself meanwhile.
            self._close_pipe()
            self._process = self._start()
            self._send((self._specs, self._windows))
        self._windows = dict(windows)
        self._send(self._windows)

    def close(self) -> None:
        """End the process; a window that it is making is made by whoever needs it."""
        self._process.kill()
        self._process.wait()
        self._close_pipe()

    def _close_pipe(self) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()

    def _send(self, message: object) -> None:
        assert self._process.stdin is not None
        # If the process was killed, training makes its windows itself, and the next message starts another one.
        with suppress(OSError):
            pickle.dump(message, self._process.stdin)
            self._process.stdin.flush()


def _feed(source: IO[bytes]) -> None:
    """Read the streams and where training was, then where it is, until the end of the source."""
    specs, previous = pickle.load(source)
    streams = {spec.name: TokenStream(spec) for spec in specs}
    messages: queue.SimpleQueue[Windows] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(source, messages), daemon=True).start()
    while True:
        windows = messages.get()
        # Only the latest message counts.
        while not messages.empty():
            windows = messages.get()
        for name, window in windows.items():
            _make_ahead(streams[name], previous.get(name, window), window, messages)
        previous = windows


def _make_ahead(stream: TokenStream, previous: int, window: int, messages: queue.SimpleQueue[Windows]) -> None:
    try:
        for number in keep_ahead(stream, previous, window):
            stream.require(number)
            if not messages.empty():
                return
    except DasError as error:
        logger.debug("%s", error)


def _receive(source: IO[bytes], messages: queue.SimpleQueue[Windows]) -> None:
    try:
        while True:
            messages.put(pickle.load(source))
    except Exception:
        # Training has ended.
        os._exit(0)


def main() -> None:
    """Run as `python -m das_ds.data.window_feeder`, by `WindowFeeder`."""
    # Signals to stop often reach all processes of a job, whose last steps still need windows.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    _feed(sys.stdin.buffer)


if __name__ == "__main__":
    main()
