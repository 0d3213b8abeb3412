"""Plasticity: how much earlier domains leave free to learn, as methods report it to console, metrics and report."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field

from das_ds.storage import Section, VersionedJson

FORMAT_VERSION: Literal[1] = 1


@dataclass(frozen=True)
class InputPlasticity:
    """What a mask P leaves of one input x with d elements."""

    width: int
    """d."""
    plasticity: float
    """tr(P) / d."""
    passing: float | None
    """E|x P|^2 / E|x|^2; None: nothing was measured, or the sample never reached the input."""


class Spread(Section):
    """A share, over several inputs."""

    median: float
    least: float
    most: float

    @classmethod
    def over(cls, values: Sequence[float]) -> Spread | None:
        """None of no values."""
        if not values:
            return None
        return cls(median=statistics.median(values), least=min(values), most=max(values))


class GroupPlasticity(Section):
    """Inputs of one kind of layer, over all layers."""

    num_inputs: int = Field(ge=1)
    plasticity: Spread
    passing: Spread | None
    """Null where nothing was measured."""


class PlasticityReading(Section):
    """What masks leave at one time."""

    plasticity: float
    """Share of the directions of all inputs together that are open: sum of tr(P) over sum of d."""
    passing: float | None
    """Share of the domain's input energy that passes: median over all inputs; null where nothing was measured."""
    groups: dict[str, GroupPlasticity]
    """By kind of layer, in the order of a layer's operations."""

    @classmethod
    def summarize(cls, inputs: Mapping[str, InputPlasticity], groups: Mapping[str, str]) -> PlasticityReading:
        """Statistics of all inputs.

        Args:
            inputs: input -> what is left, at least one.
            groups: input -> the kind of layer that reads it, in the order to report.
        """
        members: dict[str, list[InputPlasticity]] = {group: [] for group in groups.values()}
        for name, found in inputs.items():
            members[groups[name]].append(found)
        every = _passing(list(inputs.values()))
        return cls(
            plasticity=sum(x.plasticity * x.width for x in inputs.values()) / sum(x.width for x in inputs.values()),
            passing=None if every is None else every.median,
            groups={group: _summarize_group(found) for group, found in members.items() if found},
        )

    @property
    def least_passing(self) -> tuple[str, float] | None:
        """The group whose median passes the least, and that median; None where nothing was measured."""
        medians = {name: group.passing.median for name, group in self.groups.items() if group.passing is not None}
        return min(medians.items(), key=lambda item: item[1]) if medians else None


class DomainPlasticity(VersionedJson):
    """What earlier domains leave one domain to learn, and what is left after it."""

    what: ClassVar[str] = "the plasticity of a domain"
    format_version: Literal[1] = FORMAT_VERSION
    """Version of this format."""
    domain: str
    protected: list[str] = Field(default_factory=list)
    """What the masks protect while the domain is learned: files, the general corpus, earlier domains."""
    form: str = ""
    """How, in words: settings of the masks, and what is frozen beside them."""
    before: PlasticityReading
    """Under the masks of earlier domains, on the domain's text, before it is learned."""
    after: PlasticityReading | None = None
    """Under the masks that include it, on the same domain's text; null until it is learned."""


def _summarize_group(inputs: list[InputPlasticity]) -> GroupPlasticity:
    plasticity = Spread.over([x.plasticity for x in inputs])
    assert plasticity is not None, "a group has inputs"
    return GroupPlasticity(num_inputs=len(inputs), plasticity=plasticity, passing=_passing(inputs))


def _passing(inputs: list[InputPlasticity]) -> Spread | None:
    return Spread.over([x.passing for x in inputs if x.passing is not None])
