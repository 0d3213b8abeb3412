"""Naive continual learning: train on one domain after another and protect nothing.

One model per domain, each trained from the base: no forgetting by construction, no transfer either.

All domains at once: what a sequence of them is measured against.

Naive training with earlier text in every batch.
"""

from __future__ import annotations

from das_ds.methods.base import Method


class NCL(Method):
    """The baseline every other method is compared with. Keeps nothing in memory, no extra compute."""


class PerDomain(Method):
    """Every domain starts from the base weights. Keeps one host copy of each rank's fp32 shard, no extra compute."""

    starts_from_base = True


class Pool(Method):
    """Joint training on all domains, the upper bound of continual learning (`Pool` in DAS, Ke et al., ICLR 2023).

    The run has one stage (`RunConfig.stages`), in whose batches all domains take turns (`data/mixture.py`); each gives
    the samples that it would give in a sequence. Keeps nothing in memory, no extra compute, but needs the text of all
    domains from the beginning.
    """


class ExperienceReplay(Method):
    """Experience replay (Rolnick et al., NeurIPS 2019), from the corpora themselves instead of a buffer.

    Keeps nothing in memory, but needs the text of earlier domains to the end. No extra compute: what is replayed takes
    the place of new text. `data/replay.py` does it for any method with `method.replay.fraction`; this one has a
    default.
    """
