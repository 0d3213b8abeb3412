"""Checkpoints: what is in one, writing it while training goes on, and finding the newest that is whole."""
