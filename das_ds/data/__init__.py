"""Text to batches: reading, tokenizing, blocks, corruption, order; knows ranks only as numbers."""
