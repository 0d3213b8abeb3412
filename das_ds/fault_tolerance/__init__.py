"""Fault tolerance: hang watchdog, heartbeats, and orderly shutdown.

Loss spikes and losses that are not finite are handled by `training.loss_guard`.
"""
