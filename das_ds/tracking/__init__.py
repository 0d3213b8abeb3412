"""Metrics of a run: a tracker that fans out to sinks (JSONL always, W&B when chosen), and a throughput meter."""
