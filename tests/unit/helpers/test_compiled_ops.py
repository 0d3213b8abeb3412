"""The lock around compilations that are kept."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

from torch.utils import cpp_extension

from helpers.compiled_ops import LONGEST_COMPILATION_S, ProcessLock, remove_stale_locks


def hold(path: Path) -> None:
    ProcessLock(f"{path}/lock").try_acquire()
    (path / "held").touch()
    time.sleep(600)


def wait_and_count(path: Path) -> None:
    """Between taking and giving back, what others wrote would be lost."""
    lock = ProcessLock(f"{path}/lock")
    for _ in range(20):
        lock.try_acquire()
        count = int((path / "count").read_text())
        time.sleep(0.001)
        (path / "count").write_text(str(count + 1))
        lock.release()


def test_process_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    holder = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path,))
    holder.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    os.kill(holder.pid or 0, signal.SIGKILL)
    lock = ProcessLock(str(tmp_path / "lock"))
    assert lock.try_acquire()
    lock.release()
    holder.join()


def test_process_lock_has_one_holder(tmp_path: Path) -> None:
    (tmp_path / "count").write_text("0")
    processes = [multiprocessing.get_context("fork").Process(target=wait_and_count, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert (tmp_path / "count").read_text() == "60"


def test_keep_compiled_ops_has_torch_compile_under_the_lock_into_the_cache() -> None:
    assert cpp_extension.FileBaton is ProcessLock
    assert Path(os.environ["TORCH_EXTENSIONS_DIR"]).parent.name == "torch_extensions"


def test_remove_stale_locks_keeps_those_of_compilations_that_may_run(tmp_path: Path) -> None:
    for name, age in (("killed", LONGEST_COMPILATION_S + 60), ("running", 60.0)):
        lock = tmp_path / name / "lock"
        lock.parent.mkdir()
        lock.touch()
        then = time.time() - age
        os.utime(lock, (then, then))
    remove_stale_locks(tmp_path)
    assert [lock.parent.name for lock in tmp_path.glob("*/lock")] == ["running"]
