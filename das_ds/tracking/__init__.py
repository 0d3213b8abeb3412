"""Metric tracking: a tracker that fans out to sinks (JSONL always, W&B if enabled), and a throughput meter."""
