"""Checks before a run: ranks, corpora, output directory, memory."""
