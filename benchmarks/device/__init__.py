"""Benchmarks and tests for a bare machine with a GPU, started by `run.sh`."""
