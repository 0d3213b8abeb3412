"""The loops: one domain, and the sequence of domains with evaluation and export in between."""
