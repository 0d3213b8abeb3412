"""What was run for which architecture, written by the tests that ran it; `docs/architectures.md` is made of this."""

from __future__ import annotations

import json
import os
from pathlib import Path

VARIABLE = "DAS_DS_MATRIX"
"""Environment variable that names the JSON file; without it nothing is recorded."""
FEATURES = {
    "units": "units per layer (head, intermediate, output)",
    "rules": "rules proved",
    "gates": "gates",
    "logits": "logits",
    "objective": "trained with",
    "importance": "importance",
    "zero 0": "ZeRO 0",
    "zero 2": "ZeRO 2",
    "zero 3": "ZeRO 3",
    "bf16": "bf16",
    "checkpointing": "checkpointing",
    "lora": "LoRA",
}
"""Feature -> column of the table."""


def record(architecture: str, feature: str, result: str = "yes") -> None:
    """Note, after its assertions, what a test has shown; a later result of the same feature replaces an earlier one."""
    assert feature in FEATURES, f"{feature}: expected one of {', '.join(FEATURES)}"
    if VARIABLE not in os.environ:
        return
    path = Path(os.environ[VARIABLE])
    results = json.loads(path.read_text()) if path.exists() else {}
    results.setdefault(architecture, {})[feature] = result
    path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
