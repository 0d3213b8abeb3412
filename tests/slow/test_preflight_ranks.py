"""Preflight on real ranks: all is well, one rank is not like the other, and the commands as users start them."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.commands import on_two_ranks, program, write_config
from helpers.ports import reserve_port
from helpers.preflight import CHECKS, equal_on_all, failing_rank, preflight_and_error, rank_without_backend
from helpers.run_ranks import run_ranks
from helpers.runs import small_run

pytestmark = pytest.mark.multirank


def test_rank_that_fails_alone_is_named_and_nobody_waits(tmp_path: Path) -> None:
    values = small_run(tmp_path)
    folder, writing, sharing, wrong, broken = equal_on_all(run_ranks(failing_rank, 2, values))
    assert (folder.status, writing.status, sharing.status) == ("ok", "failed", "skipped")
    assert writing.found.startswith("rank 1: [Errno 1] Operation not permitted")
    assert wrong.status == "failed" and wrong.found == "rank 1: all-reduce gave 4, expected 3, the sum of 1 to 2"
    assert broken.found == "all-reduce over gloo failed: no route to host"
    assert not list(values["output_dir"].iterdir())


def test_rank_that_waits_for_another_reports_too() -> None:
    (found,) = equal_on_all(run_ranks(rank_without_backend, 2, 4.0))
    assert found.status == "failed"
    assert found.found.startswith("rank 0: all-reduce over gloo failed: ")
    assert found.found.endswith("; rank 1: all-reduce over gloo failed: no route to host")


def test_all_ranks_raise_the_same_after_all_checks(tmp_path: Path) -> None:
    values = small_run(tmp_path, train={"global_batch_size": 6})
    values["domains"][1]["train"] = [str(tmp_path / "no_such_file.txt")]
    errors = run_ranks(preflight_and_error, 2, values)
    assert errors == ["preflight: 2 checks failed: settings, corpora"] * 2


def test_deepspeed_launcher_checks_two_ranks(tmp_path: Path) -> None:
    values = small_run(tmp_path)
    path = write_config(tmp_path, values)
    done = on_two_ranks("launch/preflight.py", "--config", path)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith(("ok ", "warning ", "failed "))]
    assert [words[:2] for words in lines] == [["ok", check] for check in CHECKS]
    # The run itself, which wants a new or empty folder, can start now.
    assert not list(values["output_dir"].iterdir())


def test_rank_that_waits_in_vain_says_so(tmp_path: Path) -> None:
    path = write_config(tmp_path, small_run(tmp_path))
    lonely = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    lonely["MASTER_PORT"] = str(reserve_port())
    done = program("launch/preflight.py", "--config", path, "runtime.hang_timeout=2", **lonely)
    assert done.returncode == 2, done.stderr
    assert "das_ds: the ranks do not find each other within 2 s (runtime.hang_timeout)" in done.stderr


def test_environment_of_a_job_that_is_not_there_is_named_after_seconds(tmp_path: Path) -> None:
    path = write_config(tmp_path, small_run(tmp_path))
    lonely = {"WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29733"}
    for rank, said in (("0", "1 of 4 ranks here, waiting at"), ("2", "rank 2 of 4 is here, but gets no answer from")):
        done = program(
            "launch/preflight.py", "--config", path, "runtime.hang_timeout=13", RANK=rank, LOCAL_RANK=rank, **lonely
        )
        assert done.returncode == 2, done.stderr
        variables = "(WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT are set in the environment)"
        assert f"das_ds: {said} 127.0.0.1:29733 {variables}" in done.stderr
        assert "das_ds: the ranks do not find each other within 13 s (runtime.hang_timeout)" in done.stderr
        assert "Traceback" not in done.stderr
