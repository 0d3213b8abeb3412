"""Process group, collectives, and the parts of a run that depend on the number of ranks."""
