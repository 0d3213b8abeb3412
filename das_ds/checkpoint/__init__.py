"""Checkpoints: format, asynchronous writing, and finding the latest valid one.

`training.trainer` and `training.run_checkpoints` list the components that are saved.
"""
