"""The stages of a run: stretches of training that each end in an evaluation and an exported model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

POOL = "pool"
"""Name of a stage that learns several domains at once."""


@dataclass(frozen=True)
class Stage:
    """Some of a run's domains, learned together."""

    index: int
    """Position in the run, from 0."""
    domains: tuple[str, ...]
    """Domains in the order of the run; every global batch has text of each in equal shares."""
    num_steps: int
    """Optimizer steps."""

    @property
    def name(self) -> str:
        """Name in folders, tables and metrics."""
        return stage_name(self.domains)

    @property
    def last_domain(self) -> str:
        """Domain whose tokeniser has the tokens of all of them."""
        return self.domains[-1]

    @property
    def only_domain(self) -> str:
        """Its one domain, for what is defined for one alone."""
        assert len(self.domains) == 1, f"{self.name} is {len(self.domains)} domains, expected one"
        return self.domains[0]


def stage_name(domains: Sequence[str]) -> str:
    """The domain that a stage learns, or `pool`."""
    return domains[0] if len(domains) == 1 else POOL


def stage_folder(index: int, name: str) -> str:
    """Folder of a stage within a run folder: `domains/<ii>_<name>`."""
    return f"domains/{index:02d}_{name}"
