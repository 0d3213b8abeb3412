"""Metric tracking: a tracker that fans out to sinks (JSONL always, others if chosen), and a throughput meter."""
