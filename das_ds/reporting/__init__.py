"""Results of a run, statistics over runs, and reports."""
