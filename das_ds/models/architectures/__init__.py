"""Architecture specs: one table per model type, which names its units, gates and LM head.

A new one is a module here and a line in `registry`.
"""
