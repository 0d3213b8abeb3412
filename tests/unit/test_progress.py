"""Progress of loops where the output is a terminal, and where it is a file."""

from __future__ import annotations

import io
import sys

import pytest

from das_ds.progress import Progress, format_duration


class Terminal(io.StringIO):
    """Text that claims to be shown on a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds that pass with every look."""

    def __init__(self, seconds: float) -> None:
        self.now = 0.0
        self.seconds = seconds

    def __call__(self) -> float:
        self.now += self.seconds
        return self.now


def test_progress_without_terminal_prints_plain_lines_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    monkeypatch.setattr(sys, "stderr", output)
    items = Progress(range(4, 10), "evaluate acl", 10, initial=4, unit="batches", clock=Clock(20.0))
    assert list(items) == list(range(4, 10))
    # 20 s a batch: a line after every second one, and none for the last batch.
    assert output.getvalue() == "evaluate acl: 6/10 batches, 1m20s left\nevaluate acl: 8/10 batches, 40s left\n"


@pytest.mark.parametrize("options", [{"show": False}, {"label": ""}, {"plain_lines": False}])
def test_progress_prints_nothing_where_it_is_not_wanted(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = io.StringIO()
    monkeypatch.setattr(sys, "stderr", output)
    settings: dict[str, object] = {"label": "train", "clock": Clock(60.0)} | options
    assert list(Progress(range(3), total=3, **settings)) == [0, 1, 2]  # type: ignore[arg-type]
    assert output.getvalue() == ""


def test_progress_on_a_terminal_draws_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    output = Terminal()
    monkeypatch.setattr(sys, "stderr", output)
    items = Progress(range(2), "train acl", 2, unit="step")
    for _ in items:
        items.set_postfix("loss=5.1")
    assert "\r" in output.getvalue() and "train acl" in output.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (41, "41s"), (200, "3m20s"), (7500, "2h05m"), (3 * 86400 + 4 * 3600 + 60, "3d04h")],
)
def test_format_duration_uses_two_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
