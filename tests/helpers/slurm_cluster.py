"""A SLURM cluster of one controller and two nodes on this host, apart from any other SLURM of the machine."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil

from helpers.commands import QUICK_START, ROOT

NODES = ("n1", "n2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "srun")
TRAIN = "-m das_ds train"
"""Part of the command line of every rank of the batch files."""
FINISHED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
CONFIG = """\
ClusterName=das_ds
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/%n
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=1000"


def missing_requirement() -> str | None:
    """Why no cluster can be started here; None: it can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"needs slurm-wlm and munge, found no {', '.join(missing)}"
    return None if os.geteuid() == 0 else "needs root, to start slurmctld and slurmd"


class SlurmCluster:
    """Daemons that live as long as the `with` block; every path, port and key is the cluster's own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        self._environment = clean | {"SLURM_CONF": str(folder / "slurm.conf")} | QUICK_START

    def __enter__(self) -> SlurmCluster:
        for name in ("state", "spool", "log"):
            (self._folder / name).mkdir()
        key = self._folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        ports = free_ports(1 + len(NODES))
        host = socket.gethostname().partition(".")[0]
        nodes = (NODE.format(name=name, host=host, port=port) for name, port in zip(NODES, ports[1:], strict=True))
        text = CONFIG.format(host=host, controller_port=ports[0], folder=self._folder, nodes="\n".join(nodes))
        (self._folder / "slurm.conf").write_text(text, encoding="utf-8")
        try:
            self._start_daemons()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._end()

    def submit(self, *words: object, cwd: Path = ROOT, **environment: str) -> str:
        """Id of a new job: `sbatch WORDS` in a folder, with more variables in its environment."""
        command = ["sbatch", "--parsable", *map(str, words)]
        return self._run(command, self._environment | environment, cwd).strip()

    def call(self, *words: object) -> str:
        """Output of one of SLURM's commands."""
        return self._run([str(word) for word in words], self._environment)

    def fields(self, job: str) -> dict[str, str]:
        """What `scontrol show job` knows, such as JobState, Restarts and ExitCode (`code:signal`)."""
        words = self.call("scontrol", "show", "job", "--oneliner", job).split()
        return dict(word.partition("=")[::2] for word in words if "=" in word)

    def wait(self, job: str, timeout: float = 240.0) -> dict[str, str]:
        """Fields of a job when it has ended for good."""
        self.wait_until(lambda: self.fields(job)["JobState"] in FINISHED, f"job {job} to end", timeout)
        return self.fields(job)

    def wait_until(self, condition: Callable[[], bool], what: str, timeout: float = 240.0) -> None:
        """Return as soon as a condition is true.

        Raises:
            RuntimeError: the time ran out; with the state of all jobs and what the controller last said.
        """
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                log = (self._folder / "log" / "slurmctld").read_text(encoding="utf-8")[-2000:]
                raise RuntimeError(f"waited {timeout} s for {what}\n{self.call('squeue')}\n{log}")
            time.sleep(0.2)

    def ranks(self, job: str) -> dict[int, psutil.Process]:
        """Processes that run a job's `das-ds train` as tasks of srun, by rank."""
        found = {}
        for process in self._processes():
            with suppress(psutil.Error):
                environment = process.environ()
                is_rank = environment.get("SLURM_JOB_ID") == job and "SLURM_PROCID" in environment
                if is_rank and TRAIN in " ".join(process.cmdline()):
                    found[int(environment["SLURM_PROCID"])] = process
        return found

    def _start_daemons(self) -> None:
        munge = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid"}
        munge |= {"log-file": "log/munged", "seed-file": "munge.seed"}
        # Forced, for it does not like the folders of tests, which other users cannot enter.
        options = [f"--{name}={self._folder / path}" for name, path in munge.items()]
        self._start("munged", "--foreground", "--force", *options)
        self.wait_until((self._folder / "munge.socket").exists, "munged")
        self._start("slurmctld", "-D", "-c")
        self.wait_until(lambda: self._answers("scontrol", "ping"), "slurmctld")
        for node in NODES:
            self._start("slurmd", "-D", "-N", node)
        self.wait_until(lambda: self._idle_nodes() == len(NODES), "both nodes", 60.0)

    def _start(self, *command: str) -> None:
        with (self._folder / "log" / f"{command[0]}.out").open("ab") as log:
            # A session of its own: Ctrl-C in pytest must not end it before its jobs.
            daemon = subprocess.Popen(
                command, env=self._environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._daemons.append(daemon)

    def _answers(self, *command: str) -> bool:
        return subprocess.run(command, env=self._environment, capture_output=True, check=False).returncode == 0

    def _idle_nodes(self) -> int:
        done = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--format=%t"],
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout.split().count("idle")

    def _end(self) -> None:
        """Jobs that a test has left, daemons last to first, then what is left of jobs whose daemon did not answer."""
        with suppress(RuntimeError):
            self.call("scancel", "--user=root")
            self.wait_until(lambda: not self.call("squeue", "--noheader"), "jobs to end", 60.0)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=20.0)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in self._processes():
            with suppress(psutil.Error):
                process.kill()

    def _processes(self) -> list[psutil.Process]:
        """Processes of this cluster's jobs, by the variable that all of them inherit."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") == self._environment["SLURM_CONF"]:
                    found.append(process)
        return found

    def _run(self, command: list[str], environment: dict[str, str], cwd: Path = ROOT) -> str:
        done = subprocess.run(
            command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()
