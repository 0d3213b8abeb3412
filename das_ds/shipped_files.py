"""Files for users that lie at the root of the repository and in `das_ds/shipped/` of an installed package.

`setup.py` (command `build_shipped`) copies them when it builds a wheel. A checkout, also one that is installed in
editable mode, has no such folder and reads the originals.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
SHIPPED = PACKAGE / "shipped"


def shipped_folder(name: str) -> Path:
    """A folder of these files, such as `ds_configs`, by its path in the repository."""
    return (SHIPPED if SHIPPED.is_dir() else PACKAGE.parent) / name
