"""`das-ds inspect`: propose and verify the unit table of an unknown architecture."""
