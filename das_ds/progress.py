"""Progress of long loops: a bar on a terminal, and a plain line now and then where the output is a file or a pipe.

A bar redraws one line with carriage returns, which a log file keeps as hundreds of kilobytes of one line.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")

PLAIN_INTERVAL_S = 30.0
"""Between two plain lines of one loop; a loop that ends sooner prints none."""


def is_terminal(stream: TextIO | None = None) -> bool:
    """Whether a stream (default: standard error) redraws its last line."""
    stream = sys.stderr if stream is None else stream
    return stream.isatty()


def disable_library_bars() -> None:
    """Turn off the progress bars of transformers, which it draws in files too."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def say(text: str) -> None:
    """Print a line to standard error without breaking a bar that is drawn there."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


def format_duration(seconds: float) -> str:
    """`41s`, `3m20s`, `2h05m` or `3d04h`: two units at most, as an estimate has no more to say."""
    total = max(0, round(seconds))
    days, rest = divmod(total, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, secs = divmod(rest, 60)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    if minutes:
        return f"{minutes}m{secs:02d}s"
    return f"{secs}s"


class Progress(Iterable[T]):
    """Iterates over a loop's items and shows how far it is.

    Args:
        items: the iterable.
        label: text in front of the bar; "" shows nothing.
        total: number of items, those before `initial` included.
        initial: items that were done before.
        unit: name of one item.
        show: whether anything is shown, as on rank 0.
        leave: whether the finished bar stays on the terminal.
        plain_lines: whether lines are printed where there is no terminal; false for a caller that logs its own.
        clock: seconds.
    """

    def __init__(
        self,
        items: Iterable[T],
        label: str,
        total: int,
        *,
        initial: int = 0,
        unit: str = "it",
        show: bool = True,
        leave: bool = True,
        plain_lines: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._items = items
        self._label = label
        self._total = total
        self._initial = initial
        self._unit = unit
        self._show = show and bool(label)
        self._leave = leave
        self._plain_lines = plain_lines
        self._clock = clock
        self._bar: tqdm[T] | None = None

    def set_postfix(self, text: str) -> None:
        """Text shown after the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def __iter__(self) -> Iterator[T]:
        if not self._show:
            yield from self._items
        elif is_terminal():
            self._bar = tqdm(
                self._items,
                desc=self._label,
                total=self._total,
                initial=self._initial,
                unit=self._unit,
                leave=self._leave,
                dynamic_ncols=True,
            )
            yield from self._bar
            self._bar = None
        elif self._plain_lines:
            yield from self._with_lines()
        else:
            yield from self._items

    def _with_lines(self) -> Iterator[T]:
        start = self._clock()
        last_line = start
        for done, item in enumerate(self._items, start=self._initial + 1):
            yield item
            now = self._clock()
            if now - last_line >= PLAIN_INTERVAL_S and done < self._total:
                last_line = now
                left = (now - start) / (done - self._initial) * (self._total - done)
                say(f"{self._label}: {done}/{self._total} {self._unit}, {format_duration(left)} left")
