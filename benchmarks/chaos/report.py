"""Report of the chaos test: tables of kills and corruptions, and a summary."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.chaos.corrupted_run import Verdict
from benchmarks.chaos.job import EVERY_STEPS
from benchmarks.chaos.killed_run import Death, KilledRun
from benchmarks.chaos.reference_run import ReferenceRun
from benchmarks.chaos.schedule import ANY, PLACES, SAVING
from benchmarks.result_io import RESULTS, describe, print_table


@dataclass
class Report:
    """Collects and prints the rows of runs as they finish."""

    settings: dict[str, Any]
    reference: ReferenceRun
    num_runs: int = 0
    deaths: list[Death] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    minutes: float = 0.0

    def add_run(self, run: KilledRun) -> None:
        """Add a run that was killed and finished."""
        self.num_runs += 1
        self.deaths += run.deaths
        self.failures += [f"run {run.number}: {failure}" for failure in run.failures]
        places = (
            ", ".join(f"{death.part} {death.step}{' while saving' * death.saving}" for death in run.deaths)
            or "no kill in time"
        )
        print(f"run {run.number}: {places}: {run.failures[:3] or 'equal'}", flush=True)

    def add_verdict(self, verdict: Verdict) -> None:
        """Add a run with corrupt checkpoints."""
        self.verdicts.append(verdict)
        print(f"{verdict.damaged}: {verdict.damage}: {verdict.verdict}", flush=True)

    @property
    def missed_places(self) -> list[str]:
        """Places that no kill has hit."""
        hit = {death.place for death in self.deaths} | {SAVING for death in self.deaths if death.saving}
        return [place for place in PLACES if place != ANY and place not in hit]

    @property
    def is_good(self) -> bool:
        """Whether every run ended as expected."""
        return not self.failures and all(verdict.is_good for verdict in self.verdicts)

    def summary(self) -> dict[str, Any]:
        """Counts."""
        timeline = self.reference.timeline
        return {
            "runs": self.num_runs,
            "kills": len(self.deaths),
            "kills_by_place": dict(Counter(death.place for death in self.deaths)),
            "kills_while_saving": sum(death.saving for death in self.deaths),
            "kills_by_ranks": dict(Counter(death.ranks for death in self.deaths)),
            "failures": self.failures,
            "compared_per_run": len(self.reference.digest),
            "checkpoint_every": EVERY_STEPS,
            "most_steps_lost": max((death.steps_lost for death in self.deaths), default=0),
            "most_batches_lost": max((death.batches_lost for death in self.deaths), default=0),
            "most_seconds_to_end": max((death.seconds_to_end for death in self.deaths), default=0.0),
            "corruptions": dict(Counter(verdict.verdict for verdict in self.verdicts)),
            "undisturbed_seconds": round(
                self.reference.timeline.marks[-1].seconds - self.reference.timeline.marks[0].seconds, 1
            ),
            "milliseconds_per_save": round(timeline.save_seconds * 1e3, 1),
            "minutes": round(self.minutes, 1),
        }

    def print(self) -> None:
        """Both tables and the summary."""
        for rows in (self.deaths, self.verdicts):
            if rows:
                print_table([asdict(row) for row in rows])
                print()
        print(json.dumps(self.summary(), indent=2))

    def write(self) -> Path:
        """Write `results/chaos.json`."""
        content = {
            "environment": describe(torch.device("cpu")),
            "settings": self.settings,
            "summary": self.summary(),
            "kills": [asdict(death) for death in self.deaths],
            "corruptions": [asdict(verdict) for verdict in self.verdicts],
        }
        path = RESULTS / "chaos.json"
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return path
