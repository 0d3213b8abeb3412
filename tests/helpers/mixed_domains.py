"""A run in which every domain has settings of its own: a mixture in epochs, then one corpus in tokens, with replay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.configs import changed
from helpers.runs import WORDS, small_run


def mixed_run(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Config values of the run; `changes` are nested dictionaries of keys."""
    values = small_run(folder)
    food, papers = values["domains"]
    for corpus, num_lines in (("food", 12), ("papers", 20), ("recipes", 5)):
        # Its name is in every block, so that no two corpora have the same.
        lines = (f" {corpus} ".join(WORDS[start : start + 8]) for start in range(num_lines))
        (folder / f"{corpus}.txt").write_text("\n".join(lines))
    for corpus in ("law", "code"):
        (folder / f"{corpus}.txt").write_text(f"the {corpus} was held out for twelve weeks\n" * 30)
    sources = [
        {"name": "menus", "train": food["train"], "weight": 0.7},
        {"train": [str(folder / "recipes.txt")], "weight": 0.3},
    ]
    values = {
        **values,
        "output_dir": folder / name,
        "domains": [
            {"name": "food", "sources": sources, "valid_fraction": 0.1, "epochs": 1.5, "learning_rate": 2e-3},
            {
                **papers,
                "tokens": 800,
                "lr_scheduler": "cosine",
                "warmup_ratio": 0.3,
                "min_lr_ratio": 0.25,
                "replay": {"fraction": 0.25},
            },
        ],
        "evaluate_on": [{"name": corpus, "valid": [str(folder / f"{corpus}.txt")]} for corpus in ("law", "code")],
        "train": {**values["train"], "micro_batch_size": 2, "min_lr_ratio": 0.1, "reset_optimizer": False},
    }
    return changed(values, changes)
