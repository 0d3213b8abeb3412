"""Jobs: one command of das_ds with a folder, done once and then skipped."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import yaml

from benchmarks.domains.plan import Values
from das_ds.downstream.scores import EndTaskScores
from das_ds.errors import RunFolderError
from das_ds.reporting.results import Results
from das_ds.run_dir import END_TASKS_FILE, RESULTS_FILE

ROOT = Path(__file__).resolve().parents[2]


class Job(Protocol):
    """Work done by one das_ds command."""

    @property
    def name(self) -> str:
        """Name in messages and in the manifest."""

    @property
    def log(self) -> Path:
        """Output of the command."""

    def is_done(self) -> bool:
        """Whether nothing is left to do."""

    def command(self) -> list[str]:
        """The command to start; writes its input files."""

    def finish(self) -> None:
        """Called when the command has succeeded."""


@dataclass(frozen=True)
class TrainingRun:
    """`das-ds train` with one config, which is next to the run folder, as is its log."""

    folder: Path
    """The run folder."""
    values: Values
    """The run config without `output_dir`."""
    keeps_models: bool = False
    """Whether exported models are kept; checkpoints never are."""
    keeps_masks: bool = False
    """Whether files of importance and directions are kept."""

    @property
    def name(self) -> str:
        """Last parts of its folder."""
        return "/".join(self.folder.parts[-3:])

    @property
    def config(self) -> Path:
        """Its run config."""
        return self.folder.with_name(self.folder.name + ".yaml")

    @property
    def log(self) -> Path:
        """Output of the command."""
        return self.folder.with_name(self.folder.name + ".log")

    def is_done(self) -> bool:
        """Whether its results are complete.

        Raises:
            RunFolderError: they belong to another plan, or are damaged.
        """
        if not (self.folder / RESULTS_FILE).exists():
            return False
        if self.config.read_text(encoding="utf-8") != self._text():
            raise RunFolderError(
                f"{self.folder}: found a run of another plan (see {self.config}), expected that of this one; use "
                "another --folder or move it away"
            )
        return self.results().complete

    def command(self) -> list[str]:
        """The command; writes the config."""
        self.config.parent.mkdir(parents=True, exist_ok=True)
        self.config.write_text(self._text(), encoding="utf-8")
        return [sys.executable, str(ROOT / "launch" / "train.py"), "--config", str(self.config)]

    def finish(self) -> None:
        """Remove checkpoints, masks and models, which are gigabytes per run and no longer needed."""
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        if not self.keeps_masks:
            for path in (*self.folder.glob("*.safetensors"), *self.folder.glob("domains/*/*.safetensors")):
                path.unlink()
        if not self.keeps_models:
            for model in self.folder.glob("domains/*/model"):
                shutil.rmtree(model)

    def results(self) -> Results:
        """Results of the run.

        Raises:
            RunFolderError: they are missing or damaged.
        """
        return Results.read(self.folder / RESULTS_FILE)

    def has_model(self, index: int) -> bool:
        """Whether the model exported after domain `index` was kept."""
        return any(self.folder.glob(f"domains/{index:02d}_*/model"))

    def model(self, index: int) -> Path:
        """The model exported after domain `index`.

        Raises:
            RunFolderError: it was not kept.
        """
        if not self.has_model(index):
            raise RunFolderError(
                f"{self.folder}: found no model after domain {index}, expected it to be kept; move the folder away to "
                "train it again"
            )
        return next(iter(self.folder.glob(f"domains/{index:02d}_*/model")))

    def _text(self) -> str:
        return config_text(self.folder, self.values)


@dataclass(frozen=True)
class FineTuning:
    """`das-ds finetune` of one exported model; its config is that of the run with tasks, next to the run folder."""

    run: TrainingRun
    domain: int
    """Index of the domain after which the model was exported."""
    tasks: list[Values]
    """Sections of a run config, with their fine-tuning seeds."""

    @property
    def name(self) -> str:
        """Run, domain, tasks."""
        return f"{self.run.name}/{self.domain:02d}: {', '.join(task['name'] for task in self.tasks)}"

    @property
    def config(self) -> Path:
        """Config of the run with the tasks."""
        return self.run.folder.with_name(f"{self.run.folder.name}_tasks_{self.domain:02d}.yaml")

    @property
    def log(self) -> Path:
        """Output of the command."""
        return self.config.with_suffix(".log")

    def is_done(self) -> bool:
        """Whether every task has all its seeds."""
        path = self.run.model(self.domain).parent / END_TASKS_FILE
        if not path.exists():
            return False
        scores = EndTaskScores.read(path)
        return all(scores.has(task["name"], seed) for task in self.tasks for seed in task["seeds"])

    def command(self) -> list[str]:
        """One command for all tasks; writes the config."""
        self.config.write_text(config_text(self.run.folder, {**self.run.values, "tasks": self.tasks}), encoding="utf-8")
        script = ROOT / "launch" / "finetune.py"
        return [
            *(sys.executable, str(script), "--config", str(self.config)),
            *("--model", str(self.run.model(self.domain))),
        ]

    def finish(self) -> None:
        """Nothing to do: the scores are next to the model."""


def config_text(folder: Path, values: Values) -> str:
    """A run config in YAML."""
    return yaml.safe_dump({"output_dir": str(folder), **values}, sort_keys=False)
