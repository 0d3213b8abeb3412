"""The result file of a tier, typed and versioned: tables and plots are made from it, without the run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError

from benchmarks.domains.ablation_groups import RestoredLosses
from benchmarks.domains.lr_search import Choice
from benchmarks.result_io import RESULTS
from das_ds.errors import RunFolderError
from das_ds.reporting.comparison import Comparison
from das_ds.storage import Section, read_json_with_checksum, write_json_with_checksum

FORMAT_VERSION: Literal[2] = 2


class Repeated(Section):
    """A run that was made twice."""

    label: str
    learning_rate: float
    is_equal: bool
    """Whether both runs gave the same results, to the last digit."""


class SuiteResult(Section):
    """Results of one base model over one order of domains."""

    name: str
    base: str
    steps_per_domain: int
    comparison: Comparison
    """Of all its runs, with naive training as the baseline."""
    groups: list[RestoredLosses]
    """Of the first naive run; empty until measured."""


class Extended(Section):
    """Earlier results that were extended, perhaps on another machine."""

    environment: dict[str, Any]
    """Of their last run."""
    difference: float
    """Largest difference in nats of any loss of the naive run that was repeated."""


class TierResult(Section):
    """Results of a tier."""

    format_version: Literal[2] = FORMAT_VERSION
    """Version of this format."""
    tier: str
    environment: dict[str, Any]
    """Device, threads, versions and date."""
    extended: list[Extended] = Field(default_factory=list)
    """Earlier results that these include, oldest first."""
    settings: dict[str, Any]
    """Keys of the run config that all runs share."""
    choices: dict[str, list[Choice]]
    """Base model, and the length where suites have several -> candidate learning rates of every variant so far."""
    strengths: dict[str, dict[str, str]]
    """The same -> group of several strengths -> the variant that is compared."""
    repeated: Repeated | None
    suites: list[SuiteResult]


def result_path(tier: str, device: torch.device) -> Path:
    """Where a tier's results are committed."""
    return RESULTS / f"domains_{tier}_{device.type}.json"


def write_result_file(path: Path, result: TierResult) -> None:
    """Write a result file, replacing an older one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_with_checksum(path, result.model_dump(mode="json"))


def read_result_file(path: Path) -> TierResult:
    """Read what `write_result_file` wrote.

    Raises:
        RunFolderError: the file cannot be read, was altered, or is not a result file of this version.
    """
    try:
        return TierResult.model_validate(read_json_with_checksum(path))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "result"
        raise RunFolderError(
            f"{path}: {key}: {first['msg']}; expected results of the benchmark, format_version {FORMAT_VERSION}"
        ) from error
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path}: {error}; expected results of the benchmark") from error
