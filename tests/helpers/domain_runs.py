"""A runner of the benchmark over domains that writes results instead of training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.domains.jobs import Job, TrainingRun, config_text
from benchmarks.domains.runner import Runner
from das_ds.errors import StoppedError
from das_ds.reporting.results import build_results
from das_ds.run_dir import CONFIG_FILE, RESULTS_FILE

BEST_RATES = {"ncl": 2e-4, "directions": 1.6e-3, "ewc": 1e-4, "replay": 2e-4}
"""Method -> learning rate at which it learns most."""
FORGETTING = {"ncl": 0.8, "directions": 0.05, "ewc": 0.3, "replay": 0.4}
BEST_LAMBDA = 1e4


class FakeRunner(Runner):
    """Makes runs one after another, in memory of their names.

    Args:
        limit: runs after which time is up; None: no limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.names: list[str] = []
        self._limit = limit

    def run(self, jobs: Sequence[Job], on_finish: Callable[[Job], None] = lambda job: None) -> None:
        for job in jobs:
            if job.is_done():
                continue
            if self._limit is not None and len(self.names) >= self._limit:
                raise StoppedError("time is up")
            assert isinstance(job, TrainingRun)
            write_results(job)
            self.names.append(job.name)
            on_finish(job)


def write_results(run: TrainingRun) -> None:
    """Results that follow from method, learning rate, strength and seed of the config."""
    run.command()
    run.folder.mkdir(parents=True)
    (run.folder / CONFIG_FILE).write_text(config_text(run.folder, run.values), encoding="utf-8")
    domains = [domain["name"] for domain in run.values["domains"]]
    method = run.values["method"]
    build_results(
        method=method["name"],
        domains=domains,
        eval_domains=[*domains, "general"],
        loss_matrix=losses(method, run.values["train"]["learning_rate"], run.values["seed"], len(domains)),
        tokens_seen=1,
        wall_seconds=60.0,
        world_size=1,
        zero_stage=0,
    ).write(run.folder / RESULTS_FILE)


def losses(method: dict[str, Any], rate: float, seed: int, num_domains: int) -> list[list[float]]:
    """A loss matrix: each octave between the rate and the best one costs 0.1 nats, and rates cause forgetting."""
    name = method["name"]
    learned = 4.0 + 0.1 * abs(math.log2(rate / BEST_RATES[name])) + 0.01 * seed
    forgetting = FORGETTING[name] * math.sqrt(rate / 2e-4)
    if name == "ewc":
        forgetting += 0.1 * abs(math.log10(method["lambda"] / BEST_LAMBDA))
    rows = [[6.0] * num_domains + [3.0]]
    for stage in range(num_domains):
        seen = [learned + forgetting] * stage + [learned]
        rows.append([*seen, *[5.5] * (num_domains - stage - 1), 3.0 + forgetting])
    return rows
