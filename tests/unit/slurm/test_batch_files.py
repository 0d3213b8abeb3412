"""Batch files, of the repository and as `das-ds slurm init` writes them, with stand-ins for SLURM's commands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from das_ds.cli import main
from das_ds.slurm.batch_files import batch_files
from helpers.commands import ROOT, write_config
from helpers.runs import small_run

FILES = ("sweep.sbatch", "train.sbatch", "train_deepspeed.sbatch")
SCONTROL = """\
#!/bin/bash
case "$*" in
  "show hostnames"*) echo localhost ;;
  "show job"*) echo "JobId=7 JobState=RUNNING Reason=None " ;;
  *) echo "scontrol $*" ;;
esac
"""
# Its own options end with the first other word.
SRUN = """\
#!/bin/bash
while [[ $1 == -* ]]; do shift; done
SLURM_NODEID=0 exec "$@"
"""
# Ranks and launchers write their words and end as the test wants. What is asked about the config has fixed answers,
# as reading one takes seconds, or is asked of Python.
PYTHON = """\
#!/bin/bash
case "$*" in
  *deepspeed.launcher.launch* | *'-m das_ds train'*) printf '%s\\n' "$0" "$@" >{record}; exit {code} ;;
esac
[[ -z $ASKS_PYTHON ]] || exec {python} "$@"
case "$*" in
  *'-P -m das_ds.slurm.job_facts'*) printf '%s\\n' {folder}/run versions ;;
  *'-P -m das_ds.slurm.sweep'*) printf '%s\\n' --config run.yaml "element=$*" ;;
esac
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a job, with a config, in which there is no checkout but a package of das_ds's name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "das_ds").mkdir()
    (tmp_path / "das_ds" / "__init__.py").write_text("raise ImportError('found in the current folder')")
    write_config(tmp_path, small_run(tmp_path))
    executable(tmp_path / "bin" / "scontrol", SCONTROL)
    executable(tmp_path / "bin" / "srun", SRUN)
    return tmp_path


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def stand_in(folder: Path, name: str = "a python", code: int = 0) -> Path:
    """A Python that writes the words of ranks to `folder/record`."""
    record = shlex.quote(str(folder / "record"))
    text = PYTHON.format(record=record, code=code, python=sys.executable, folder=shlex.quote(str(folder)))
    return executable(folder / name, text)


def submit(folder: Path, text: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A job of one node, run as SLURM does: a copy of the batch file, in the folder of the submission."""
    copy = executable(folder / "spool" / "slurm_script", text)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "DAS_DS_"))}
    clean |= {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    clean |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_NNODES": "1"}
    clean |= {"SLURM_SUBMIT_DIR": str(folder), "SLURM_ARRAY_TASK_ID": "0", "ASKS_PYTHON": ""} | environment
    return subprocess.run(
        ["bash", str(copy), *words], cwd=folder, env=clean, capture_output=True, text=True, timeout=120, check=False
    )


def recorded(folder: Path) -> list[str]:
    return (folder / "record").read_text().splitlines()


@pytest.mark.parametrize("is_written", [False, True])
@pytest.mark.parametrize("file", ["train.sbatch", "train_deepspeed.sbatch"])
def test_batch_file_runs_the_ranks_and_leaves_no_record(file: str, is_written: bool, folder: Path) -> None:
    python = stand_in(folder)
    if is_written:
        done = submit(folder, batch_files(Path("slurm"), python)[file], "--config", "run.yaml", "seed=1")
    else:
        text = (ROOT / "launch" / "slurm" / file).read_text()
        environment = {"DAS_DS_PYTHON": str(python), "DAS_DS_ROOT": str(ROOT)}
        done = submit(folder, text, "--config", "run.yaml", "seed=1", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = [str(python), "-P", "-u", "-m", "das_ds", "train", "--config", "run.yaml", "seed=1"]
    words = recorded(folder)
    assert words[-len(ranks) :] == ranks
    if file == "train_deepspeed.sbatch":
        assert words[:4] == [str(python), "-u", "-m", "deepspeed.launcher.launch"]
        assert words[-len(ranks) - 2 : -len(ranks)] == ["--no_python", "--no_local_rank"]
    assert f"output_dir {folder / 'run'}; versions\n" in done.stdout
    assert not (folder / "run.slurm_attempts").exists()


def test_written_file_reads_the_config_with_the_package_of_its_python(folder: Path) -> None:
    text = batch_files(Path("slurm"), stand_in(folder))["train.sbatch"]
    done = submit(folder, text, "--config", "run.yaml", ASKS_PYTHON="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"output_dir {folder / 'run'}; das_ds " in done.stdout and f" of {ROOT / 'das_ds'}, python " in done.stdout


def test_written_sweep_trains_its_element(folder: Path) -> None:
    text = batch_files(Path("slurm"), stand_in(folder))["sweep.sbatch"]
    done = submit(folder, text, "--seeds", "5,6", "--config", "run.yaml", SLURM_ARRAY_TASK_ID="1")
    assert done.returncode == 0, done.stdout + done.stderr
    element = "element=-P -m das_ds.slurm.sweep --element 1 --seeds 5,6 --config run.yaml"
    assert recorded(folder)[1:] == ["-P", "-u", "-m", "das_ds", "train", "--config", "run.yaml", element]


def test_written_file_takes_another_python_and_requeues(folder: Path) -> None:
    text = batch_files(Path("slurm"), folder / "missing")["train.sbatch"]
    other = stand_in(folder, "other", code=75)
    done = submit(folder, text, "--config", "run.yaml", DAS_DS_PYTHON=str(other))
    assert done.returncode == 75 and recorded(folder)[0] == str(other)
    assert "stopped on request; requeued\nscontrol requeue 7\n" in done.stdout


def test_written_file_without_its_python_says_what_to_do(folder: Path) -> None:
    done = submit(folder, batch_files(Path("slurm"), folder / "it's gone")["train.sbatch"], "--config", "run.yaml")
    assert done.returncode == 2
    assert done.stderr.startswith(f"das_ds: found no Python at {folder}/it's gone; install das_ds there again, or ")
    assert "DAS_DS_PYTHON" in done.stderr and done.stderr.count("\n") == 1


def test_init_writes_each_file_for_this_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["slurm", "init", "my jobs/slurm"]) == 0
    written = Path("my jobs/slurm")
    assert tuple(sorted(os.listdir(written))) == FILES
    out = capsys.readouterr().out
    assert out.startswith(f"wrote {', '.join(str(written / name) for name in FILES)}\nnext: sbatch ")
    assert "'my jobs/slurm/train.sbatch' --config" in out
    for name in FILES:
        text = (written / name).read_text()
        assert f"\ndefault_python={shlex.quote(sys.executable)}\n" in text
        # Nothing of the repository is left, and what SLURM reads stands before the first command.
        assert not re.search(r"launch/|repository:|\broot\b|DAS_DS_ROOT|docs/", text)
        assert text.startswith("#!/usr/bin/env bash\n") and "\n#SBATCH --requeue\n" in text.partition("\nset -euo")[0]
        assert "'my jobs/slurm'/" + name in text
        subprocess.run(["bash", "-n", written / name], check=True)


def test_init_refuses_to_overwrite_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("slurm").mkdir()
    Path("slurm/train.sbatch").write_text("mine")
    assert main(["slurm", "init"]) == 2
    expected = "das_ds: slurm init slurm: found train.sbatch there, expected a folder without batch files; move "
    assert capsys.readouterr().err.startswith(expected)
    assert os.listdir("slurm") == ["train.sbatch"] and Path("slurm/train.sbatch").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file/slurm", "slurm init file/slurm: cannot be written (Not a directory)"),
        ("a\nb", "found folder 'a\\nb', exp"),
    ],
)
def test_init_unusable_folder_is_one_line(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert main(["slurm", "init", name]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert os.listdir() == ["file"]
