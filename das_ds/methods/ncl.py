"""Naive continual learning: train on one domain after another and protect nothing."""

from das_ds.methods.base import Method


class Naive(Method):
    """The baseline every other method is compared with. Keeps nothing in memory, no extra compute."""
