"""The result file of a tier, typed and versioned: tables and pictures are made of it, without the run folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from benchmarks.domains.choice import Choice
from benchmarks.domains.groups import Restored
from benchmarks.domains.matching import Match
from benchmarks.environment import RESULTS
from pydantic import Field, ValidationError

from benchmarks.domains.jobs import TrainingRun
from benchmarks.domains.plan import NAIVE
from das_ds.errors import RunFolderError
from das_ds.reporting.comparison import Comparison
from das_ds.reporting.group_runs import compare_runs
from das_ds.reporting.load_runs import read_run
from das_ds.storage import Section, read_json_with_checksum, write_json_with_checksum

FORMAT_VERSION: Literal[1] = 1


class Repeated(Section):
    """One run that was made twice."""

    label: str
    learning_rate: float
    is_equal: bool
    """Whether both gave the same results, to the last digit."""


class TrackRecord(Section):
    """One base model over one order of domains."""

    name: str
    base: str
    comparison: Comparison
    """Of all its runs; naive training is the reference."""
    matches: list[Match]
    groups: list[Restored]
    """Of the first naive run; empty until it was measured."""


class Extended(Section):
    """Results that were gone on from, perhaps on another machine."""

    environment: dict[str, Any]
    """Of their last run."""
    difference: float
    """Nats by which a loss of the naive run that was made again differs at most."""


class Record(Section):
    """All that a tier has to say."""

    format_version: Literal[1] = FORMAT_VERSION
    """Version of this format."""
    tier: str
    environment: dict[str, Any]
    """Device, threads, versions and date."""
    extended: list[Extended] = Field(default_factory=list)
    """Those that these results hold as well, oldest first."""
    settings: dict[str, Any]
    """Keys of the run config that all runs share."""
    choices: dict[str, list[Choice]]
    """Base model -> choice of every variant."""
    repeated: Repeated | None
    tracks: list[TrackRecord]


def compared(runs: Mapping[str, Sequence[TrainingRun]]) -> Comparison:
    """Those runs that are done, by label, against naive training, which has to be among them."""
    done = [(label, run) for label, of_label in runs.items() for run in of_label if run.is_done()]
    return compare_runs([read_run(f"{label}={run.folder}") for label, run in done], NAIVE)


def result_path(tier: str, device: torch.device) -> Path:
    """Where a tier's results are committed."""
    return RESULTS / ("_".join(dict.fromkeys(("domains", tier, device.type))) + ".json")


def write_record(path: Path, record: Record) -> None:
    """Write a result file in place of the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_with_checksum(path, record.model_dump(mode="json"))


def read_record(path: Path) -> Record:
    """Read it back.

    Raises:
        RunFolderError: it cannot be read, was altered, or is no result file of this version.
    """
    try:
        return Record.model_validate(read_json_with_checksum(path))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "record"
        raise RunFolderError(
            f"{path}: {place}: {first['msg']}; expected results of the benchmark, format_version {FORMAT_VERSION}"
        ) from error
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path}: {error}; expected results of the benchmark") from error
