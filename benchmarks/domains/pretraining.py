"""Base models that das_ds itself pre-trains on the general corpus, as the only domain of a run.

The encoder's head is trained on a frozen body, which was tuned to give one vector per sentence: together they predict
the general corpus at more than 6 nats, so that any further text would make them better at everything and nothing could
be forgotten. A short pre-training of all weights makes of them a language model that has something to lose.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.domains.data import GENERAL, corpus
from benchmarks.domains.jobs import TrainingRun
from benchmarks.domains.plan import BaseName, Tier, Values, merge_values


def pretraining_run(tier: Tier, name: BaseName, folder: Path, data: Path, cache: Path, start: Values) -> TrainingRun:
    """The run that pre-trains a base model.

    Args:
        tier: its settings, and those of this model.
        name: of the model.
        folder: of the tier's runs.
        data: of the corpora.
        cache: of tokenised text.
        start: keys of the run config that say what it starts from.
    """
    own = {"domains": [corpus(data, GENERAL)], "data": {"cache_dir": str(cache)}}
    values = merge_values(own, tier.settings, tier.pretraining[name], start)
    return TrainingRun(folder / f"{name}_{tier.name}", values, keeps_models=True)
