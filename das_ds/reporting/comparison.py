"""comparison.json: several runs side by side, typed and versioned; tables and pictures are drawn from it alone.

Every number is there per run, and means and intervals are taken when it is drawn, so that a committed file can be
drawn again without the folders of its runs.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from das_ds.reporting.score_matrix import RunScores, ScoreMatrix
from das_ds.storage import Section, VersionedJson

FORMAT_VERSION: Literal[1] = 1

Matrix = list[list[float]]


class GroupOverlap(Section):
    """Importance of one unit group; D sources, L layers."""

    claimed: list[float]
    """(D) share of its units that each source claims."""
    jaccard: Matrix
    """(D, D) units that both claim by units that one of them claims."""
    cosine: Matrix
    """(D, D) cosine of the importance of two sources."""
    fullness: list[float]
    """(L) mean accumulated importance of each layer; 1 minus this is the capacity left."""


class ImportanceNumbers(Section):
    """What the importance files of a run come to."""

    granularity: Literal["unit", "parameter"]
    """Whether a number belongs to a unit or to a weight."""
    threshold: float
    """A source claims a unit of at least this importance."""
    sources: list[str]
    """What was important before training, where that was measured, then the domains."""
    groups: dict[str, GroupOverlap]
    """Unit group -> numbers; of weights, those of a group's own parameters, and the rest under `others`."""

    @property
    def outline(self) -> object:
        """What has to be equal for means over runs."""
        return self.granularity, self.sources, {name: len(group.fullness) for name, group in self.groups.items()}


class Cost(Section):
    """What a run took."""

    wall_seconds: float
    """All parts together where it was resumed."""
    num_ranks: int
    tokens_seen: int
    tokens_per_s: float | None
    """Median over the logged lines, all ranks; null without metrics.jsonl."""
    peak_memory_gib: float | None
    """Largest of rank 0, on its GPU or, without one, in RAM; null without metrics.jsonl."""

    @property
    def rank_hours(self) -> float:
        """Hours of GPUs, or of CPU ranks."""
        return self.wall_seconds * self.num_ranks / 3600


class RunNumbers(Section):
    """One run."""

    seed: int
    folder: str
    """The last two parts of its path."""
    loss_matrix: Matrix = Field(min_length=2)
    """Held-out loss: row 0 before any training, then after each stage; a column per evaluated corpus."""
    learned_rows: list[int]
    """For each domain the row right after learning it, as in `Results.rows_learned`."""
    forgetting: float | None
    """Average over the domains; null where it is not defined, as for a method that learns all at once."""
    forgetting_per_domain: dict[str, float]
    general_drift: float | None
    """Null without a general corpus."""
    forward_transfer: float | None
    """What earlier domains did for later ones; null where it is not defined."""
    end_tasks: RunScores | None
    """Null where no model of it was fine-tuned."""
    importance: ImportanceNumbers | None
    """Null without importance files."""
    cost: Cost
    versions: dict[str, str]

    @property
    def learned(self) -> float:
        """Mean domain loss right after learning."""
        return sum(self.loss_matrix[row][i] for i, row in enumerate(self.learned_rows)) / len(self.learned_rows)

    @property
    def learned_later(self) -> float:
        """Mean loss right after learning over domains 2..T, whose learning is what forgetting comes of.

        The first domain has nothing to protect, so that a method can learn it at its full rate: a mean over all domains
        would count that as learning that costs no forgetting. Of a single domain it is its own loss.
        """
        later = range(1, len(self.learned_rows)) if len(self.learned_rows) > 1 else range(1)
        return sum(self.loss_matrix[self.learned_rows[i]][i] for i in later) / len(later)

    @property
    def final(self) -> float:
        """Mean domain loss at the end."""
        return sum(self.loss_matrix[-1][: len(self.learned_rows)]) / len(self.learned_rows)

    @property
    def scores(self) -> ScoreMatrix | None:
        """Scores on end tasks, each task by the metric that it reports."""
        return None if self.end_tasks is None else self.end_tasks.matrices["reported"]


class Group(Section):
    """Runs that differ in their seed alone."""

    label: str
    method: str
    settings: dict[str, str]
    """Keys in which the groups differ, with their values as text."""
    stages: list[str]
    """Row names of its loss matrices."""
    runs: list[RunNumbers] = Field(min_length=1)
    """Sorted by seed."""

    @model_validator(mode="after")
    def _runs_fit(self) -> Group:
        seeds = [run.seed for run in self.runs]
        if seeds != sorted(set(seeds)):
            raise ValueError(f"{self.label}: expected runs sorted by seed, each seed once, found seeds {seeds}")
        if any(len(run.loss_matrix) != len(self.stages) for run in self.runs):
            raise ValueError(f"{self.label}: expected loss matrices of {len(self.stages)} rows, one per stage")
        found = [run.importance.outline for run in self.runs if run.importance is not None]
        if any(outline != found[0] for outline in found):
            raise ValueError(f"{self.label}: expected importance of the same sources, groups and layers in all runs")
        return self


class Comparison(VersionedJson):
    """Groups of runs over the same domains."""

    what: ClassVar[str] = "a comparison of runs"
    format_version: Literal[1] = FORMAT_VERSION
    """Version of this format."""
    domains: list[str] = Field(min_length=1)
    """In the order of learning."""
    eval_domains: list[str]
    """Columns of the loss matrices: the domains, then the general corpus where there is one."""
    groups: list[Group] = Field(min_length=1)
    """In the order in which their runs were given."""
    reference: str
    """Label of the group that the others are held against."""
    notes: list[str]
    """What was left out and why, and what to mind; one sentence each."""

    @model_validator(mode="after")
    def _groups_fit(self) -> Comparison:
        labels = [group.label for group in self.groups]
        if len(set(labels)) < len(labels) or self.reference not in labels:
            raise ValueError(f"expected labels that differ, the reference {self.reference} among them, found {labels}")
        width = len(self.eval_domains)
        if any(len(row) != width for group in self.groups for run in group.runs for row in run.loss_matrix):
            raise ValueError(f"expected loss matrices of {width} columns, one per corpus of eval_domains")
        return self

    def group(self, label: str) -> Group:
        """The group of this label."""
        return next(group for group in self.groups if group.label == label)
