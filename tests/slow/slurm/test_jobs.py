"""The real trainer under the batch files, on two nodes: to the end, stopped, killed, and swept."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from das_ds.reporting.results import Results
from das_ds.run_dir import RESULTS_FILE
from das_ds.slurm.batch_files import write_batch_files
from helpers.commands import ROOT, write_config
from helpers.resume import assert_same_run
from helpers.runs import last_step, small_run
from helpers.slurm_cluster import SlurmCluster

pytestmark = pytest.mark.multirank

# Long enough to be met in the middle of its domain; what is saved in between is what a kill goes back to.
TRAIN = {"steps_per_domain": 150, "micro_batch_size": 2}
CHECKPOINT = {"interval": 40}
ON_TWO_NODES = ("--nodes", 2, "--ntasks-per-node", 1)


class Job:
    """A job over `folder`; its run is `folder/run`, its log `folder/log`.

    Args:
        file: a batch file of the repository, or the path of one that needs none: then it is submitted in `folder`.
    """

    def __init__(self, cluster: SlurmCluster, folder: Path, file: str | Path, **changes: Any) -> None:
        folder.mkdir(exist_ok=True)
        self.cluster = cluster
        self.run = folder / "run"
        self._log = folder / "log"
        values = small_run(folder, train=TRAIN, checkpoint=CHECKPOINT, **changes)
        config = write_config(folder, {**values, "domains": values["domains"][:1]})
        cwd = ROOT if isinstance(file, str) else folder
        script = cwd / "launch" / "slurm" / file
        self.id = cluster.submit(*ON_TWO_NODES, "--output", self._log, script, "--config", config, cwd=cwd)

    @property
    def log(self) -> str:
        # A killed rank may leave half a character of its progress bar.
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def wait_for_step(self, step: int) -> None:
        """Return when the metrics of a step, or of a later one, are written."""
        self.cluster.wait_until(lambda: last_step(self.run) >= step, f"step {step}")

    def finish(self, *, restarts: int) -> None:
        """Wait for a good end after so many restarts."""
        fields = self.cluster.wait(self.id)
        assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("COMPLETED", "0:0", str(restarts)), (
            self.log[-5000:]
        )
        assert not self.run.with_name("run.slurm_attempts").exists()

    def places(self) -> list[str]:
        """Where the attempts began."""
        return re.findall(r"attempt begins at: (\S+);", self.log)


@pytest.fixture(scope="module")
def uninterrupted(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that one job took from beginning to end."""
    job = Job(cluster, tmp_path_factory.mktemp("uninterrupted"), "train.sbatch")
    job.finish(restarts=0)
    assert job.places() == ["start"]
    return job.run


def test_job_on_two_nodes_finishes(uninterrupted: Path) -> None:
    results = Results.read(uninterrupted / RESULTS_FILE)
    assert results.complete and results.world_size == 2


@pytest.mark.parametrize("file", ["train.sbatch", "train_deepspeed.sbatch"])
def test_written_batch_file_trains_the_same_without_the_repository(
    file: str, cluster: SlurmCluster, uninterrupted: Path, tmp_path: Path
) -> None:
    written = next(path for path in write_batch_files(tmp_path / "slurm") if path.name == file)
    job = Job(cluster, tmp_path / "elsewhere", written)
    job.finish(restarts=0)
    assert_same_run(job.run, uninterrupted)


@pytest.mark.parametrize(
    ("file", "words"),
    # Under srun the ranks are signalled, under DeepSpeed's launcher the batch shell.
    [("train.sbatch", ["--signal=USR1"]), ("train_deepspeed.sbatch", ["--batch", "--signal=USR1"])],
)
def test_signal_leads_to_a_checkpoint_a_requeue_and_the_same_run(
    file: str, words: list[str], cluster: SlurmCluster, uninterrupted: Path, tmp_path: Path
) -> None:
    job = Job(cluster, tmp_path, file)
    job.wait_for_step(10)
    cluster.call("scancel", *words, job.id)
    job.finish(restarts=1)
    assert "ranks ended with exit code 75" in job.log and "stopped on request; requeued" in job.log
    first, second = job.places()
    assert first == "start" and re.fullmatch(r"food_train_\d+", second)
    # Not at one of the steps that are saved without being asked: no step is done twice.
    assert 10 <= int(second.rpartition("_")[2]) < 150 and not (job.run / "STOP").exists()
    assert_same_run(job.run, uninterrupted)


def test_node_launcher_outlives_a_signal_to_its_ranks(
    cluster: SlurmCluster, uninterrupted: Path, tmp_path: Path
) -> None:
    job = Job(cluster, tmp_path, "train_deepspeed.sbatch")
    job.wait_for_step(10)
    cluster.call("scancel", "--signal=USR1", job.id)
    job.finish(restarts=1)
    assert "ranks ended with exit code 75" in job.log
    assert_same_run(job.run, uninterrupted)


def test_killed_rank_ends_the_attempt_and_the_next_goes_on(
    cluster: SlurmCluster, uninterrupted: Path, tmp_path: Path
) -> None:
    job = Job(cluster, tmp_path, "train.sbatch", runtime={"hang_timeout": 20.0})
    job.wait_for_step(60)
    cluster.ranks(job.id)[1].send_signal(signal.SIGKILL)
    job.finish(restarts=1)
    assert "ranks ended with exit code 137" in job.log and "did not finish; requeued" in job.log
    assert "rank 1 (pid " in job.log
    assert job.places()[1].startswith("food_train_")
    assert_same_run(job.run, uninterrupted)


def test_sweep_trains_every_element_in_a_folder_of_its_own(cluster: SlurmCluster, tmp_path: Path) -> None:
    config = write_config(tmp_path, small_run(tmp_path))
    id_ = cluster.submit(
        *("--array", "0-1", "--nodes", 1, "--ntasks-per-node", 1, "--output", tmp_path / "log-%a"),
        *("launch/slurm/sweep.sbatch", "--methods", "ncl", "--orders", "food,papers:papers,food", "--config", config),
        "train.steps_per_domain=2",
    )
    for element, order in enumerate((["food", "papers"], ["papers", "food"])):
        fields = cluster.wait(f"{id_}_{element}")
        assert fields["JobState"] == "COMPLETED", (tmp_path / f"log-{element}").read_text()[-5000:]
        results = json.loads((tmp_path / "run" / f"ncl-seed0-{'+'.join(order)}" / RESULTS_FILE).read_text())
        assert results["domains"] == order and results["method"] == "ncl"
