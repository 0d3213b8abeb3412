"""What a stopped run says: the reason as it is, a signal or a sentence, and where it goes on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from das_ds.errors import StoppedError
from das_ds.fault_tolerance.shutdown import ShutdownHandler
from das_ds.run_dir import RunDir
from das_ds.training.save_point import SavePoint
from das_ds.training.train import _stop_if_requested
from helpers.single_rank import SingleRank

GONE = "the launcher (pid 7) is gone (all ranks)"


def test_stop_before_training_names_the_reason_and_removes_the_file(tmp_path: Path) -> None:
    with ShutdownHandler(RunDir(tmp_path), []) as shutdown:
        _stop_if_requested(SingleRank(), shutdown)
        RunDir(tmp_path).stop_file.touch()
        with pytest.raises(
            StoppedError, match=r"^stopped before training began: [^;]*STOP[^;]*; the same command starts"
        ):
            _stop_if_requested(SingleRank(), shutdown)
    assert not RunDir(tmp_path).stop_file.exists()


def test_stop_after_saving_names_the_reason_and_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    point: Any = SavePoint.__new__(SavePoint)
    point._flag_sync = SimpleNamespace(stop_reasons=lambda local: GONE)
    point._ranks = SingleRank()
    point._shutdown = SimpleNamespace(remove_stop_file=lambda: None)
    point._saveable = SimpleNamespace(describe=lambda run: "domain acl, step 7 of 9")
    monkeypatch.setattr(point, "save", lambda run: None)
    with pytest.raises(StoppedError) as stopped:
        point._stop(cast(Any, None), None)
    assert str(stopped.value) == f"stopped: {GONE}; saved at domain acl, step 7 of 9, where the same command resumes"
