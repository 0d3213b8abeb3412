"""Fault tolerance: hang watchdog, heartbeats, and orderly shutdown."""
