"""The corpora and end tasks of the benchmark, in the folder that `DAS_DS_DATA` names.

Layout: `<corpus>/train.txt.xz` and `<corpus>/valid.txt.xz`, a document per line, and
`tasks/<task>/{train,dev,test}.jsonl.xz`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from das_ds.errors import DataError

VARIABLE = "DAS_DS_DATA"
GENERAL = "general"
TASKS: dict[str, dict[str, str]] = {
    "restaurant_asc": {"kind": "pair", "metric": "macro_f1"},
    "phone_asc": {"kind": "pair", "metric": "macro_f1"},
    "camera_asc": {"kind": "pair", "metric": "macro_f1"},
    "acl_arc": {"kind": "text", "metric": "macro_f1"},
    "scierc": {"kind": "entities", "metric": "macro_f1"},
    "chemprot": {"kind": "entities", "metric": "micro_f1"},
}
"""End task -> its kind and reported metric (Ke et al., ICLR 2023, section 4)."""
TASK_OF = {
    "restaurant": "restaurant_asc",
    "phone": "phone_asc",
    "camera": "camera_asc",
    "acl": "acl_arc",
    "ai": "scierc",
    "pubmed": "chemprot",
}
"""Domain -> its end task."""


def data_folder() -> Path:
    """The folder of the corpora.

    Raises:
        DataError: the variable is not set, or is not a folder.
    """
    value = os.environ.get(VARIABLE, "")
    if not value:
        raise DataError(f"{VARIABLE}: not set, expected the folder with general/, restaurant/, acl/ ... and tasks/")
    folder = Path(value).expanduser().resolve()
    if not folder.is_dir():
        raise DataError(f"{VARIABLE}: found {value}, which is no folder; expected one with general/, restaurant/ ...")
    return folder


def corpus(folder: Path, name: str) -> dict[str, Any]:
    """A corpus section of a run config."""
    return {"name": name} | {part: [str(folder / name / f"{part}.txt.xz")] for part in ("train", "valid")}


def task(folder: Path, name: str, seeds: Iterable[int]) -> dict[str, Any]:
    """A task section of a run config."""
    files = {part: str(folder / "tasks" / name / f"{part}.jsonl.xz") for part in ("train", "dev", "test")}
    return {"name": name, **files, **TASKS[name], "seeds": list(seeds)}


def check_files(folder: Path, corpora: Iterable[str], tasks: Iterable[str] = ()) -> None:
    """Check that all files exist, before hours of work.

    Raises:
        DataError: files are missing.
    """
    expected = [folder / name / f"{part}.txt.xz" for name in corpora for part in ("train", "valid")]
    expected += [folder / "tasks" / name / f"{part}.jsonl.xz" for name in tasks for part in ("train", "dev", "test")]
    if missing := [path.relative_to(folder).as_posix() for path in expected if not path.is_file()]:
        raise DataError(f"{VARIABLE}: {folder} lacks {', '.join(missing)}; expected xz-compressed text of that name")
