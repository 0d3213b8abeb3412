"""The wheel as users get it: built from the sdist, in an environment of its own outside any checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

from helpers.commands import BIN, PATIENCE_S, QUICK_START, ROOT

NOT_SOURCE = (".*", "__pycache__", "build", "dist", "runs", "wandb", "*.egg-info")
"""What lies in a checkout beside its sources."""


def build_sdist(folder: Path) -> Path:
    """The sdist of this checkout, built from a copy of it with the installed setuptools."""
    checkout = folder / "checkout"
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    return _build("sdist", checkout, folder)


def build_wheel(sdist: Path, folder: Path) -> Path:
    """The wheel that is built from what an sdist contains."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    return _build("wheel", source, folder)


def _build(kind: str, source: Path, folder: Path) -> Path:
    """Call a hook of PEP 517, as pip and build do, in the folder of the sources."""
    script = f"from setuptools import build_meta; build_meta.build_{kind}({str(folder / 'dist')!r})"
    before = set((folder / "dist").glob("*"))
    _run([sys.executable, "-c", script], cwd=source, env=_clean_environment())
    (built,) = set((folder / "dist").glob("*")) - before
    return built


class Environment:
    """A virtual environment with a wheel, which takes its dependencies from the environment of the tests.

    Args:
        folder: where it is made.
        wheel: installed by pip.
        home: working directory and home folder of its commands.
    """

    def __init__(self, folder: Path, wheel: Path, home: Path) -> None:
        _run([sys.executable, "-m", "venv", "--without-pip", folder], cwd=home, env=_clean_environment())
        self.bin = folder / "bin"
        self.python = self.bin / "python"
        self._home = home
        options = ["--no-deps", "--no-index", "--no-cache-dir", "--quiet"]
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install", *options, wheel]
        _run(pip, cwd=home, env=_clean_environment())
        shown = self.run(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
        self.packages = Path(shown.stdout.strip())
        # Only folders of an environment have their .pth files read: an editable das_ds is not found in this one.
        outer = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
        (self.packages / "dependencies.pth").write_text("\n".join(outer) + "\n", encoding="utf-8")
        launcher = (BIN / "deepspeed").read_text(encoding="utf-8").partition("\n")[2]
        (self.bin / "deepspeed").write_text(f"#!{self.python}\n{launcher}", encoding="utf-8")
        (self.bin / "deepspeed").chmod(0o755)

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        """A command that must succeed, such as `das-ds` of this environment."""
        environment = _clean_environment() | QUICK_START
        environment |= {"PATH": f"{self.bin}:{environment['PATH']}", "HOME": str(self._home), "HF_HUB_OFFLINE": "1"}
        return _run(list(words), cwd=self._home, env=environment)


def _clean_environment() -> dict[str, str]:
    """Variables without those that could show the checkout, or make the process a rank."""
    hidden = ("PYTHON", "DAS_DS_", "SLURM_", "VIRTUAL_ENV", "RANK", "WORLD_SIZE", "LOCAL_RANK", "XDG_CACHE_HOME")
    return {key: value for key, value in os.environ.items() if not key.startswith(hidden)}


def _run(words: list[object], *, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = list(map(str, words))
    # Found in the environment's own path, not in that of the tests.
    program = shutil.which(command[0], path=env["PATH"]) or command[0]
    done = subprocess.run(
        [program, *command[1:]], cwd=cwd, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout[-5000:]}{done.stderr[-5000:]}"
    return done
