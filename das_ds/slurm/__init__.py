"""SLURM: batch files that need no checkout, and what batch files ask about a run config."""
