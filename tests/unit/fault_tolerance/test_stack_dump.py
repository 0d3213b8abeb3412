"""Locations of threads, from the output of `faulthandler`."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from das_ds.fault_tolerance.stack_dump import Frame, StackReport, inspect_stacks, parse_stacks
from helpers.waiting import until

# As Python 3.11 and 3.14 write them: the latter with the names of threads.
DUMP = """Thread 0x00007f411a2176c0 [das-ds-heartbeat] (most recent call first):
  File "/x/a b, line 3 in c.py", line 982 in run
  File "/x/threading.py", line 1002 in _bootstrap

Thread 0x00000000000000ff (most recent call first):
  <no Python frame>

Current thread 0x00007f411ae55b80 (most recent call first):
  File "<stdin>", line 7 in <module>
  ...
"""


def test_parse_stacks_gives_frames_by_thread() -> None:
    assert parse_stacks(DUMP) == {
        0x7F411A2176C0: [Frame("/x/a b, line 3 in c.py", 982, "run"), Frame("/x/threading.py", 1002, "_bootstrap")],
        0xFF: [],
        0x7F411AE55B80: [Frame("<stdin>", 7, "<module>")],
    }


@pytest.mark.parametrize(
    ("file", "function", "in_collective"),
    [
        ("/x/torch/distributed/distributed_c10d.py", "hold", True),
        ("/x/deepspeed/comm/comm.py", "hold", True),
        ("/x/deepspeed/runtime/zero/partition_parameters.py", "wait", True),
        ("/x/deepspeed/runtime/engine.py", "hold", False),
        ("/x/torch/functional.py", "hold", False),
    ],
)
def test_inspect_stacks_waiting_thread_is_in_collective(file: str, function: str, in_collective: bool) -> None:
    code: dict[str, Any] = {}
    exec(compile(f"def {function}(lock, began):\n    began.set()\n    lock.acquire()", file, "exec"), code)
    lock = threading.Lock()
    began = threading.Event()
    lock.acquire()
    thread = threading.Thread(target=code[function], args=(lock, began), daemon=True)
    thread.start()
    assert began.wait(20.0) and thread.ident is not None
    ident = thread.ident
    until(lambda: inspect_stacks(ident).location == f"{file}:3 {function}")
    assert inspect_stacks(ident) == StackReport(in_collective, f"{file}:3 {function}")
    lock.release()
    thread.join()
    assert inspect_stacks(ident) == StackReport(None, "")


def test_inspect_stacks_names_the_innermost_line_of_the_package() -> None:
    report = inspect_stacks(threading.get_ident())
    assert report.in_collective is False
    assert report.location.startswith("das_ds/fault_tolerance/stack_dump.py:")
    assert report.location.endswith(" inspect_stacks")
