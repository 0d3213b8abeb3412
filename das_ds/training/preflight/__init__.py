"""Checks before an expensive run: what would stop it later is found in seconds, on all ranks, without an engine."""
