"""Tutorials as programs: their files are written, their commands run, their output is compared with what they show."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from helpers.commands import BIN, QUICK_START, ROOT

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE_NAME = re.compile(r"# (\S+\.yaml)\n")
NUMBER = re.compile(r"[+-]?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?%?")
ELISION = "..."
PATIENCE_S = 1800.0
"""For one block of commands, on a machine that is busy with others."""


@dataclass(frozen=True)
class Step:
    """A block of commands, the files that are written before it, and the output that is shown after it."""

    commands: str
    files: dict[str, str]
    shown: list[str] = field(default_factory=list)


def read_steps(page: Path) -> list[Step]:
    """The steps of a tutorial.

    A block `yaml` that begins with a comment of a file name is that file, `bash` is run, `text` is the output of the
    commands before it; other blocks, without a language, are for reading.
    """
    steps: list[Step] = []
    files: dict[str, str] = {}
    for language, text in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "yaml" and (name := FILE_NAME.match(text)):
            files[name[1]] = text
        elif language == "bash":
            steps.append(Step(text, files))
            files = {}
        elif language == "text":
            steps[-1].shown.extend(text.splitlines())
    return steps


def run_step(step: Step, folder: Path) -> list[str]:
    """Run a step in its folder, as a reader does, and give the lines of its output."""
    for name, text in step.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    clean = {key: value for key, value in os.environ.items() if key not in hidden}
    offline = {"HF_HUB_OFFLINE": "1", "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", step.commands],
        cwd=folder,
        env=clean | QUICK_START | offline,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, f"{step.commands}{done.returncode}\n{done.stdout[-5000:]}"
    return done.stdout.splitlines()


def missing_lines(shown: Iterable[str], printed: Iterable[str]) -> list[str]:
    """Lines that a tutorial shows, from the first one on that was not printed in this order, whatever the numbers."""
    rest = iter([_without_numbers(line) for line in printed])
    wanted = [line for line in shown if line.strip() not in ("", ELISION)]
    # `in` reads an iterator up to the line that it finds, so that the next one is looked for behind it.
    return [line for line in wanted if _without_numbers(line) not in rest]


def _without_numbers(line: str) -> str:
    """A line with its numbers as `#`; tables are as wide as their numbers."""
    return re.sub(r"-{2,}", "--", " ".join(NUMBER.sub("#", line).split()))
