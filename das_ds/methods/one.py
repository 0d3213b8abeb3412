"""One model per domain, each trained from the base: no forgetting by construction, no transfer either."""

from das_ds.methods.base import Method


class FromBase(Method):
    """Every domain starts from the base weights. Keeps one host copy of each rank's fp32 shard, no extra compute."""

    starts_from_base = True
