"""Job runner: jobs are done once, stopped at a deadline, and refused if they belong to another plan."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.domains.jobs import Job, TrainingRun
from benchmarks.domains.runner import MANIFEST, MIN_TIME_TO_START_S, Runner
from das_ds.errors import RunFolderError, StoppedError, TrainingError
from das_ds.reporting.results import build_results
from das_ds.run_dir import RESULTS_FILE


@dataclass(frozen=True)
class Script:
    """A job that runs a few words of Python, after which it is done if they made its file."""

    file: Path
    code: str

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def log(self) -> Path:
        return self.file.with_suffix(".log")

    def is_done(self) -> bool:
        return self.file.exists()

    def command(self) -> list[str]:
        return [sys.executable, "-S", "-c", self.code]

    def finish(self) -> None:
        self.file.with_suffix(".finished").touch()


class Endless(Script):
    """A job that exits with code 75 when it is asked to stop; from then on there is a file that others wait for."""

    @property
    def ready(self) -> Path:
        return self.file.with_suffix(".ready")

    def command(self) -> list[str]:
        return ["sh", "-c", f"trap 'exit 75' TERM; : > '{self.ready}'; while :; do sleep 0.1; done"]


def after(endless: Endless, code: str) -> str:
    """Words of Python that run once another job can be stopped."""
    return f"import os, time\nwhile not os.path.exists({str(endless.ready)!r}): time.sleep(0.05)\n{code}"


def writing(path: Path, text: str = "once") -> Script:
    return Script(path, f"import os; open({str(path)!r}, 'a').write({text!r}); print(os.environ['OMP_NUM_THREADS'])")


def manifest(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / MANIFEST).read_text().splitlines()]


def test_runner_runs_jobs_once_and_records_them(tmp_path: Path) -> None:
    jobs = [writing(tmp_path / name) for name in ("a", "b", "c")]
    runner = Runner(tmp_path, threads=3, parallel=2)
    runner.run(jobs)
    runner.run(jobs)
    assert [job.file.read_text() for job in jobs] == ["once"] * 3
    assert {job.log.read_text() for job in jobs} == {"3\n"}
    assert all(job.file.with_suffix(".finished").exists() for job in jobs)
    assert sorted(line["job"] for line in manifest(tmp_path)) == ["a", "b", "c"]


def test_runner_tells_of_every_finished_job(tmp_path: Path) -> None:
    jobs = [writing(tmp_path / name) for name in ("a", "b", "c")]
    jobs[0].file.touch()
    told: list[str] = []
    Runner(tmp_path, threads=1).run(jobs, lambda job: told.append(job.name))
    # What was done before is not told again.
    assert told == ["b", "c"]


def test_runner_error_while_telling_stops_the_other_jobs(tmp_path: Path) -> None:
    def refuse(job: Job) -> None:
        raise RunFolderError(f"{job.name} differs")

    endless = Endless(tmp_path / "long", "")
    first = Script(tmp_path / "a", after(endless, f"open({str(tmp_path / 'a')!r}, 'w')"))
    with pytest.raises(RunFolderError, match="a differs"):
        Runner(tmp_path, threads=1, parallel=2).run([first, endless], refuse)
    assert [line["exit_code"] for line in manifest(tmp_path) if line["job"] == "long"] == [75]


def test_runner_one_job_alone_gets_all_threads(tmp_path: Path) -> None:
    job = writing(tmp_path / "a")
    Runner(tmp_path, threads=3, parallel=2).run_alone(job)
    assert job.log.read_text() == "6\n"


@pytest.mark.parametrize("code", ["raise SystemExit(2)", "pass"])
def test_runner_failed_job_is_named(tmp_path: Path, code: str) -> None:
    with pytest.raises(TrainingError, match=r"bad: ended with exit code [02], expected 0 and results; see .*bad\.log"):
        Runner(tmp_path, threads=1).run([Script(tmp_path / "bad", code), writing(tmp_path / "after")])
    assert not (tmp_path / "after").exists()


def test_runner_failure_stops_other_jobs_and_is_raised(tmp_path: Path) -> None:
    endless = Endless(tmp_path / "long", "")
    jobs = [endless, Script(tmp_path / "bad", after(endless, "1 / 0"))]
    with pytest.raises(TrainingError, match="bad: ended with exit code 1"):
        Runner(tmp_path, threads=1, parallel=2).run(jobs)
    assert {line["job"]: line["exit_code"] for line in manifest(tmp_path)} == {"long": 75, "bad": 1}


def test_runner_deadline_asks_jobs_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.domains.runner.MIN_TIME_TO_START_S", 0.0)
    with pytest.raises(StoppedError, match="long: stopped and saved; the same command resumes"):
        Runner(tmp_path, threads=1, minutes=5 / 60).run([Endless(tmp_path / "long", "")])
    assert [line["exit_code"] for line in manifest(tmp_path)] == [75]


def test_runner_starts_nothing_near_the_deadline(tmp_path: Path) -> None:
    with pytest.raises(StoppedError, match="time is up"):
        Runner(tmp_path, threads=1, minutes=0.9 * MIN_TIME_TO_START_S / 60).run([writing(tmp_path / "late")])
    assert not (tmp_path / "late").exists()


def done_run(folder: Path, rate: float = 1e-3) -> TrainingRun:
    """A training run with results, checkpoints and a model."""
    run = TrainingRun(folder / "ncl" / "seed0", {"train": {"learning_rate": rate}})
    run.command()
    for name in ("checkpoints", "domains/00_a/model"):
        (run.folder / name).mkdir(parents=True)
    for name in (
        "directions.safetensors",
        "domains/00_a/importance.safetensors",
        "domains/00_a/model/model.safetensors",
    ):
        (run.folder / name).touch()
    results = build_results(
        method="ncl",
        domains=["a"],
        eval_domains=["a"],
        loss_matrix=[[2.0], [1.0]],
        tokens_seen=1,
        wall_seconds=1.0,
        world_size=1,
        zero_stage=0,
    )
    results.write(run.folder / RESULTS_FILE)
    return run


def test_training_run_finish_removes_checkpoints_masks_and_models(tmp_path: Path) -> None:
    run = done_run(tmp_path)
    assert run.is_done()
    run.finish()
    assert not (run.folder / "checkpoints").exists() and not list(run.folder.rglob("*.safetensors"))
    with pytest.raises(RunFolderError, match=r"seed0: found no model after domain 0, expected it to be kept; move"):
        run.model(0)
    with_models = TrainingRun(done_run(tmp_path / "kept").folder, run.values, keeps_models=True)
    with_models.finish()
    assert [path.name for path in with_models.model(0).iterdir()] == ["model.safetensors"]
    with_masks = TrainingRun(done_run(tmp_path / "masks").folder, run.values, keeps_masks=True)
    with_masks.finish()
    assert len(list(with_masks.folder.rglob("*.safetensors"))) == 2 and not with_masks.has_model(0)


def test_training_run_of_another_plan_is_refused(tmp_path: Path) -> None:
    other = TrainingRun(done_run(tmp_path).folder, {"train": {"learning_rate": 2e-3}})
    with pytest.raises(RunFolderError, match=r"found a run of another plan .*expected that of this one; use another"):
        other.is_done()
