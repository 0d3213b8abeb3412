"""Public benchmarks: multiple-choice and cloze tasks, scored by log-likelihood on every model of a run.

Set in the config as `benchmarks`, run as `das-ds benchmark`.
"""
