"""Pure mathematics: torch only; no ranks, no I/O, no model classes."""
