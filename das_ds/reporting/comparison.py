"""The model of comparison.json: several runs compared, typed and versioned.

Every value is stored per run; means and intervals are computed when a table or plot is made. A committed file can
therefore be rendered again without the run folders.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from das_ds.reporting.results import measured
from das_ds.reporting.score_matrix import RunScores, ScoreMatrix
from das_ds.storage import Section, VersionedJson

FORMAT_VERSION: Literal[1] = 1

Matrix = list[list[float]]
Losses = list[list[float | None]]
"""None: not measured, as in `Results.loss_matrix`."""


class GroupOverlap(Section):
    """Importance of one unit group; D sources, L layers."""

    claimed: list[float]
    """(D) fraction of its units that each source claims."""
    jaccard: Matrix
    """(D, D) units claimed by both sources over units claimed by either."""
    cosine: Matrix
    """(D, D) cosine between the importance of two sources."""
    mask_saturation: list[float]
    """(L) mean accumulated importance of each layer; 1 minus this is the capacity left."""


class ImportanceSummary(Section):
    """Statistics of a run's importance files."""

    granularity: Literal["unit", "parameter"]
    """Whether importance belongs to units or to single weights."""
    threshold: float
    """A source claims a unit of at least this importance."""
    sources: list[str]
    """General knowledge before training, if measured, then the domains."""
    groups: dict[str, GroupOverlap]
    """By unit group. At parameter level: the parameters that the group owns; those of no group are under `others`."""

    @property
    def structure(self) -> object:
        """Everything that must be equal between runs whose importance is averaged."""
        num_layers = {name: len(group.mask_saturation) for name, group in self.groups.items()}
        return self.granularity, self.sources, num_layers


class Cost(Section):
    """Time, tokens and memory of a run."""

    wall_seconds: float
    """Summed over all starts of a resumed run."""
    num_ranks: int
    tokens_seen: int
    tokens_per_s: float | None
    """Of all ranks, median over the logged lines; null without metrics.jsonl."""
    peak_memory_gib: float | None
    """Of rank 0, on its GPU or, without one, in RAM; null without metrics.jsonl."""

    @property
    def rank_hours(self) -> float:
        """GPU hours, or hours of CPU ranks."""
        return self.wall_seconds * self.num_ranks / 3600


class RunSummary(Section):
    """One run of a comparison."""

    seed: int
    folder: str
    """The last two parts of its path."""
    loss_matrix: Losses = Field(min_length=2)
    """Held-out loss in nats: row 0 before training, then one row per stage; one column per evaluated corpus."""
    learned_rows: list[int]
    """For each domain, the row right after learning it, as in `Results.rows_learned`."""
    forgetting: float | None
    """Average over domains; null where undefined, as for a method that learns all domains at once."""
    forgetting_per_domain: dict[str, float]
    general_drift: float | None
    """Null without a general corpus."""
    drift: dict[str, float | None] = Field(default_factory=dict)
    """Other corpora that are only evaluated -> loss after the last stage minus before training."""
    forward_transfer: float | None
    """Effect of earlier domains on later ones; null where undefined."""
    end_tasks: RunScores | None
    """Null if no model of the run was fine-tuned."""
    importance: ImportanceSummary | None
    """Null without importance files."""
    cost: Cost
    versions: dict[str, str]

    @property
    def loss_after_learning(self) -> float:
        """Mean over domains of the loss right after learning the domain."""
        return sum(self._losses_learned) / len(self._losses_learned)

    @property
    def loss_after_learning_later(self) -> float:
        """Mean over domains 2..T of the loss right after learning the domain; with one domain, the loss of that one.

        Earlier domains are forgotten by learning later ones. The first domain has nothing to protect, so any method can
        learn it at full speed; including it would count as learning that costs no forgetting.
        """
        later = range(1, len(self.learned_rows)) if len(self.learned_rows) > 1 else range(1)
        return sum(self._losses_learned[i] for i in later) / len(later)

    @property
    def final_loss(self) -> float | None:
        """Mean over domains of the loss after the last stage; None where one is no longer evaluated."""
        losses = [loss for loss in self.loss_matrix[-1][: len(self.learned_rows)] if loss is not None]
        return sum(losses) / len(losses) if len(losses) == len(self.learned_rows) else None

    @property
    def _losses_learned(self) -> list[float]:
        return [measured(self.loss_matrix[row][i]) for i, row in enumerate(self.learned_rows)]

    @property
    def scores(self) -> ScoreMatrix | None:
        """End-task scores, each task by the metric that it reports."""
        return None if self.end_tasks is None else self.end_tasks.matrices["reported"]


class Group(Section):
    """Runs that differ only in their seed."""

    label: str
    method: str
    settings: dict[str, str]
    """Config keys in which the groups differ -> this group's value as text."""
    stages: list[str]
    """Row names of the loss matrices."""
    runs: list[RunSummary] = Field(min_length=1)
    """Sorted by seed."""

    @model_validator(mode="after")
    def _check_runs(self) -> Group:
        seeds = [run.seed for run in self.runs]
        if seeds != sorted(set(seeds)):
            raise ValueError(f"{self.label}: expected runs sorted by seed, each seed once, found seeds {seeds}")
        if any(len(run.loss_matrix) != len(self.stages) for run in self.runs):
            raise ValueError(f"{self.label}: expected loss matrices of {len(self.stages)} rows, one per stage")
        structures = [run.importance.structure for run in self.runs if run.importance is not None]
        if any(structure != structures[0] for structure in structures):
            raise ValueError(f"{self.label}: expected importance of the same sources, groups and layers in all runs")
        return self


class Comparison(VersionedJson):
    """Groups of runs over the same domains."""

    what: ClassVar[str] = "a comparison of runs"
    format_version: Literal[1] = FORMAT_VERSION
    """Version of this format."""
    domains: list[str] = Field(min_length=1)
    """In training order."""
    eval_domains: list[str]
    """Columns of the loss matrices: the domains, the general corpus if there is one, then other corpora."""
    groups: list[Group] = Field(min_length=1)
    """In the order in which their runs were given."""
    reference: str
    """Label of the baseline, the group that all others are compared with."""
    notes: list[str]
    """Omissions and warnings, one sentence each."""

    @model_validator(mode="after")
    def _check_groups(self) -> Comparison:
        labels = [group.label for group in self.groups]
        if len(set(labels)) < len(labels) or self.reference not in labels:
            raise ValueError(f"expected labels that differ, the reference {self.reference} among them, found {labels}")
        width = len(self.eval_domains)
        if any(len(row) != width for group in self.groups for run in group.runs for row in run.loss_matrix):
            raise ValueError(f"expected loss matrices of {width} columns, one per corpus of eval_domains")
        return self

    def group(self, label: str) -> Group:
        """The group with this label."""
        return next(group for group in self.groups if group.label == label)
