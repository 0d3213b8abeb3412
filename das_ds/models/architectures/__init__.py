"""One table per model type: where its units, gates and LM head are."""
