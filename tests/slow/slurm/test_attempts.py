"""The batch files at the end of an attempt, with a stand-in for Python that ends as a test wants."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from helpers.runs import small_run
from helpers.slurm_cluster import SlurmCluster

pytestmark = pytest.mark.multirank

# Ranks do what $RANK_DOES says; everything else that the batch files ask of Python is answered by Python.
STAND_IN = """\
#!/bin/bash
case "$*" in
  *'-m das_ds train'*) trap 'exit 75' TERM; touch "$STARTED"; eval "$RANK_DOES"; exit ;;
esac
exec {python} "$@"
"""


@pytest.fixture
def submit(cluster: SlurmCluster, tmp_path: Path) -> Callable[..., str]:
    """Submits a job of two nodes whose ranks run the given commands; its log is `tmp_path/log`."""
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(python=sys.executable), encoding="utf-8")
    python.chmod(0o755)
    values = small_run(tmp_path)
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({**values, "output_dir": str(values["output_dir"])}), encoding="utf-8")

    def submit(
        does: str, *words: str, stalls: int = 1, file: str = "train.sbatch", options: tuple[str, ...] = ("--nodes=2",)
    ) -> str:
        return cluster.submit(
            *(*options, "--ntasks-per-node=1", "--output", tmp_path / "log"),
            *(f"launch/slurm/{file}", "--config", config, *words),
            DAS_DS_PYTHON=str(python),
            DAS_DS_MAX_STALLS=str(stalls),
            RANK_DOES=does,
            RUN=str(values["output_dir"]),
            STARTED=str(tmp_path / "started"),
        )

    return submit


def test_gives_up_after_restarts_without_a_new_checkpoint(
    cluster: SlurmCluster, submit: Callable[..., str], tmp_path: Path
) -> None:
    job = cluster.wait(submit("exit 3", stalls=1))
    log = (tmp_path / "log").read_text()
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "3:0", "1"), log
    assert log.count("attempt begins at: start") == 2
    assert "gave up after 2 attempts in a row without a new checkpoint" in log and "DAS_DS_MAX_STALLS=1" in log


def test_new_checkpoints_start_the_count_anew_but_not_one_at_the_same_place(
    cluster: SlurmCluster, submit: Callable[..., str], tmp_path: Path
) -> None:
    # The attempts leave checkpoints at steps 1, 2, 2, of which the last is none: four attempts with one stall allowed
    # would be five if it counted, and two without any progress.
    does = (
        'n=$SLURM_RESTART_COUNT; n=${n:-0}; mkdir -p "$RUN/checkpoints"; step=$((n < 1 ? 1 : 2)); '
        '[[ $SLURM_PROCID == 1 ]] || mkdir -p "$RUN/checkpoints/00000${n}_food_train_$step"; exit 75'
    )
    job = cluster.wait(submit(does, stalls=1))
    log = (tmp_path / "log").read_text()
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "75:0", "3"), log
    assert re.findall(r"begins at: (\S+); restarts without progress: (\d)", log) == [
        ("start", "0"),
        ("food_train_1", "0"),
        ("food_train_2", "0"),
        ("food_train_2", "1"),
    ]


@pytest.mark.parametrize("file", ["train.sbatch", "train_deepspeed.sbatch"])
def test_canceled_job_is_not_requeued_though_its_ranks_saved(
    file: str, cluster: SlurmCluster, submit: Callable[..., str], tmp_path: Path
) -> None:
    id_ = submit("while true; do sleep 0.1; done", file=file)
    cluster.wait_until((tmp_path / "started").exists, "the ranks to start")
    cluster.call("scancel", id_)
    job = cluster.wait(id_)
    log = (tmp_path / "log").read_text()
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0"), log
    assert "ranks ended with exit code" in log and "not requeued by the batch file: the job was canceled" in log


def test_canceled_element_is_not_requeued_while_another_runs(
    cluster: SlurmCluster, submit: Callable[..., str], tmp_path: Path
) -> None:
    does = 'touch "$STARTED-$SLURM_ARRAY_TASK_ID"; while [[ ! -e $STARTED-end ]]; do sleep 0.1; done'
    options = ("--nodes=1", "--array=0-1")
    id_ = submit(does, "--seeds", "0,1", file="sweep.sbatch", options=options)
    cluster.wait_until(lambda: all((tmp_path / f"started-{element}").exists() for element in (0, 1)), "both elements")
    # The last one: its id is that of the entire array.
    cluster.call("scancel", f"{id_}_1")
    ended = cluster.wait(f"{id_}_1")
    (tmp_path / "started-end").touch()
    fields = cluster.wait(f"{id_}_0")
    log = (tmp_path / "log").read_text()
    assert (ended["JobId"], ended["JobState"], ended["Restarts"]) == (id_, "CANCELLED", "0"), log
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "0"), log


def test_wrong_config_ends_the_job_with_code_2_before_any_rank_starts(
    cluster: SlurmCluster, submit: Callable[..., str], tmp_path: Path
) -> None:
    job = cluster.wait(submit("exit 0", "train.learning_rat=1"))
    log = (tmp_path / "log").read_text()
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0"), log
    assert "train.learning_rat" in log and not (tmp_path / "started").exists()


def test_users_error_of_the_ranks_is_not_requeued(
    cluster: SlurmCluster, submit: Callable[..., str], tmp_path: Path
) -> None:
    job = cluster.wait(submit("exit 2"))
    log = (tmp_path / "log").read_text()
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0"), log
    assert "not requeued: the message above says what has to be fixed" in log


def test_two_nodes_see_each_other_and_one_address(
    cluster: SlurmCluster, submit: Callable[..., str], tmp_path: Path
) -> None:
    id_ = submit('echo "rank $SLURM_PROCID of $SLURM_STEP_NUM_TASKS on $SLURMD_NODENAME: $MASTER_ADDR:$MASTER_PORT"')
    assert cluster.wait(id_)["JobState"] == "COMPLETED"
    log = (tmp_path / "log").read_text()
    for rank, node in enumerate(("n1", "n2")):
        assert f"rank {rank} of 2 on {node}: 127.0.0.1:{10000 + int(id_) % 20000}" in log
    assert f"job {id_} (id {id_}), restart 0" in log and "torch 2" in log
