"""Text to batches: reading, tokenising, blocks, corruption, order; knows ranks only as numbers."""
