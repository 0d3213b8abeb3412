"""Stages of a run: periods of training that each end with an evaluation and an exported model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

POOL = "pool"
"""Name of a stage that trains on several domains jointly."""


@dataclass(frozen=True)
class Stage:
    """Domains of a run that are learned together."""

    index: int
    """Position in the run, from 0."""
    domains: tuple[str, ...]
    """Domains in the order of the run, which take turns in every global batch."""
    num_steps: int
    """Optimizer steps."""
    weights: tuple[int, ...] = ()
    """Parts of the samples that each domain has, as integers; empty: equal parts."""

    @property
    def name(self) -> str:
        """Name in folders, tables and metrics."""
        return stage_name(self.domains)

    @property
    def last_domain(self) -> str:
        """Domain whose tokenizer has the added tokens of all of them."""
        return self.domains[-1]

    @property
    def only_domain(self) -> str:
        """Its domain, for operations that are defined for one only."""
        assert len(self.domains) == 1, f"{self.name} is {len(self.domains)} domains, expected one"
        return self.domains[0]


def stage_name(domains: Sequence[str]) -> str:
    """The domain that a stage learns, or `pool`."""
    return domains[0] if len(domains) == 1 else POOL


def stage_folder(index: int, name: str) -> str:
    """Folder of a stage within a run folder: `domains/<ii>_<name>`."""
    return f"domains/{index:02d}_{name}"
