"""Pre-training of base models by das_ds on the general corpus, as the only domain of a run.

The encoder's head is trained on a frozen body, which was tuned to give one vector per sentence. Together they predict
the general corpus at more than 6 nats, so any further text would improve every corpus and nothing could be forgotten.
A short pre-training of all weights turns them into a language model that can forget.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from benchmarks.domains.data import GENERAL, corpus
from benchmarks.domains.jobs import TrainingRun
from benchmarks.domains.plan import BaseName, Tier, Values, merge_values


def pretraining_run(tier: Tier, name: BaseName, folder: Path, data: Path, cache: Path, base: Path) -> TrainingRun:
    """The run that pre-trains a base model.

    Args:
        tier: its settings, and those of this model.
        name: of the model.
        folder: of base models.
        data: of the corpora.
        cache: of tokenized text.
        base: folder of the initial weights.
    """
    values: Values = {
        "model": {"name_or_path": str(base)},
        "domains": [corpus(data, GENERAL)],
        "data": {"cache_dir": str(cache)},
    }
    values = merge_values(values, tier.settings, tier.pretraining[name])
    # Tiers that pre-train in the same way share the model.
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return TrainingRun(folder / f"{name}-{digest[:12]}", values, keeps_models=True)
