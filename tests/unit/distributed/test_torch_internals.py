"""Private functions of torch.distributed stay in one file."""

from __future__ import annotations

import re
from pathlib import Path

PACKAGE = Path(__file__).parents[3] / "das_ds"
PRIVATE = re.compile(r"distributed_c10d\._|\b_set_pg_timeout\b|\b_get_default_store\b|\._get_backend\b")


def test_private_torch_distributed_names_are_in_one_file() -> None:
    files = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if PRIVATE.search(path.read_text())]
    assert [str(file) for file in files] == ["distributed/torch_internals.py"]
