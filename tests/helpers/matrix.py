"""What was tried with which architecture, recorded by the tests that tried it, and the page made of it.

`make matrix` runs those tests with DAS_DS_MATRIX naming a file, to which every one adds a line, and then this module,
which replaces the table in `docs/architectures.md`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

VARIABLE = "DAS_DS_MATRIX"
FEATURES = ("objective", "units", "rules", "ZeRO 0", "ZeRO 2", "ZeRO 3", "bf16", "checkpointing", "LoRA")
BEGIN, END = "<!-- matrix -->", "<!-- end of matrix -->"
PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"


def record(architecture: str, feature: str, result: str) -> None:
    """Note what a test saw, where a file is wanted."""
    assert feature in FEATURES, f"feature: found {feature}, known: {', '.join(FEATURES)}"
    if path := os.environ.get(VARIABLE):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps([architecture, feature, result]) + "\n")


def table(lines: list[str]) -> str:
    """Markdown: a row per architecture, a column per feature; a cell that no test filled says so."""
    found: dict[str, dict[str, str]] = {}
    for line in lines:
        architecture, feature, result = json.loads(line)
        found.setdefault(architecture, {})[feature] = result
    rows = [["architecture", *FEATURES], ["---"] * (len(FEATURES) + 1)]
    rows += [[name, *(cells.get(feature, "not run") for feature in FEATURES)] for name, cells in sorted(found.items())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Replace the table of the page by what the file holds."""
    content = PAGE.read_text(encoding="utf-8")
    before, after = content.split(BEGIN)[0], content.split(END)[1]
    lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    PAGE.write_text(f"{before}{BEGIN}\n{table(lines)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
