"""Naive training with earlier text in every batch."""

from das_ds.methods.base import Method


class NaiveReplay(Method):
    """Experience replay (Rolnick et al., NeurIPS 2019), from the corpora themselves instead of a buffer.

    Keeps nothing in memory, but needs the text of earlier domains to the end. No extra compute: what is replayed takes
    the place of new text. `data/replay.py` does it for any method with `method.replay.share`; this one has a default.
    """
