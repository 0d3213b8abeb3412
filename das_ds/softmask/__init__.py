"""The soft mask: measuring importance, normalizing it over the shards of ZeRO, and masking updates with it."""
