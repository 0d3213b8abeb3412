"""Errors in helper threads."""

from __future__ import annotations

import logging
import threading

import pytest

from das_ds.thread_guard import ThreadGuard


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_thread_guard_logs_first_error_and_continues(
    error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    guard = ThreadGuard("the thread failed")
    rounds = list[int]()

    def work() -> None:
        for number in range(5):
            with guard:
                rounds.append(number)
                if number in (1, 2):
                    raise error("no such thing")
            assert guard.has_failed is (number in (1, 2))
        rounds.append(5)

    with caplog.at_level(logging.ERROR):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert rounds == [0, 1, 2, 3, 4, 5]
    assert len(caplog.records) == 1 and "the thread failed" in caplog.messages[0]
    assert "no such thing" in caplog.text and "Traceback" in caplog.text
