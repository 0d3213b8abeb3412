"""Which tests ran for which architecture: written by the tests that ran it, set into docs/internals/architectures.md.

`make matrix` runs the tests marked `matrix` and then this module, `python -m helpers.matrix RESULTS PAGE`.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

VARIABLE = "DAS_DS_MATRIX"
"""Environment variable that names the JSON file; without it nothing is recorded."""
FEATURES = {
    "objective": "Trained with",
    "units": "Heads, intermediate, outputs",
    "rules": "Rules proved",
    "gates": "Gates",
    "logits": "Logits",
    "zero 0": "ZeRO 0",
    "zero 2": "ZeRO 2",
    "zero 3": "ZeRO 3",
    "importance": "Importance",
    "bf16": "bf16",
    "checkpointing": "Checkpointing",
    "lora": "LoRA",
}
"""Feature -> column of the table."""
BEGIN = "<!-- matrix: made by `make matrix` -->"
END = "<!-- end of matrix -->"
NOT_RUN = "-"

Results = dict[str, dict[str, str]]
"""Architecture -> feature -> result."""


def record(architecture: str, feature: str, result: str = "yes") -> None:
    """Note, after its assertions, what a test has shown; a later result of the same feature replaces an earlier one."""
    assert feature in FEATURES, f"{feature}: expected one of {', '.join(FEATURES)}"
    if VARIABLE not in os.environ:
        return
    path = Path(os.environ[VARIABLE])
    results = json.loads(path.read_text()) if path.exists() else {}
    results.setdefault(architecture, {})[feature] = result
    path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def table(results: Results) -> str:
    """The results in Markdown, with the versions they were made with."""
    rows = [["Architecture", *FEATURES.values()], ["---"] * (1 + len(FEATURES))]
    rows += [[name, *(cells.get(feature, NOT_RUN) for feature in FEATURES)] for name, cells in sorted(results.items())]
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "deepspeed"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + f"\n\nRun with {libraries}; `{NOT_RUN}`: not run."


def set_into(page: str, results: Results) -> str:
    """The page with a new table between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(results)}\n{END}{after}"


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(set_into(target.read_text(), json.loads(source.read_text())))
