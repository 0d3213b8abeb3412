"""Data: text to token files, blocks, sample streams and batches."""
