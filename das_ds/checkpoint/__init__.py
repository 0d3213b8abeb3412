"""Checkpoints: format, asynchronous writing, and finding the latest valid one."""
