"""Hang watchdog, heartbeats, and orderly shutdown."""
