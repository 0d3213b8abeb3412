"""Architecture specs: one table per model type, which names its units, gates and LM head."""
