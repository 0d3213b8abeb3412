"""The DeepSpeed engine: one optimizer step under ZeRO, its fp32 shards, and how updates are masked."""
