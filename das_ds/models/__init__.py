"""Models: loading, architecture specs, unit gates, LM loss, LoRA, vocabulary growth."""
