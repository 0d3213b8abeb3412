"""All domains at once: what a sequence of them is measured against."""

from das_ds.methods.base import Method


class Pool(Method):
    """Joint training on all domains, the upper bound of continual learning (`Pool` in DAS, Ke et al., ICLR 2023).

    The run has one stage (`RunConfig.stages`), in whose batches all domains take turns (`data/reading.py`); each gives
    the samples that it would give in a sequence. Keeps nothing in memory, no extra compute, but needs the text of all
    domains from the beginning.
    """
