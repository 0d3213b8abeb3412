"""What a run has learned and forgotten: results.json, its pictures and its report."""
