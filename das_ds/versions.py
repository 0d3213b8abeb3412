"""Versions of Python and of the libraries that affect the results of a run."""

from __future__ import annotations

import importlib.metadata
import platform

PACKAGES = ("das_ds", "torch", "deepspeed", "transformers", "datasets", "tokenizers")


def library_versions() -> dict[str, str]:
    """Versions of Python and of those PACKAGES that are installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
