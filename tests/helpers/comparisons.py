"""Comparisons with values made by hand."""

from __future__ import annotations

from collections.abc import Sequence

from das_ds.reporting.comparison import Comparison, Cost, Group, GroupOverlap, ImportanceSummary, RunSummary
from das_ds.reporting.score_matrix import SCORE_NAMES, RunScores, ScoredTask, ScoreMatrix, TaskForgetting

T_OF_TWO = 12.706204736
"""The 97.5 % quantile of Student's t with one degree of freedom, from a table."""
BEFORE = [6.0, 5.0, 3.0]
STAGES = ["before training", "after acl", "after pubmed"]


def run_summary(
    seed: int, learned: float, forgetting: float, *, importance: ImportanceSummary | None = None
) -> RunSummary:
    """A run over acl and pubmed that learns both to `learned` and forgets acl by `forgetting`."""
    return RunSummary(
        seed=seed,
        folder=f"runs/{seed}",
        loss_matrix=[BEFORE, [learned, 4.5, 3.1], [learned + forgetting, learned, 3.0 + forgetting]],
        learned_rows=[1, 2],
        forgetting=forgetting,
        forgetting_per_domain={"acl": forgetting},
        general_drift=forgetting,
        forward_transfer=0.5,
        end_tasks=None,
        importance=importance,
        cost=Cost(wall_seconds=1800.0, num_ranks=4, tokens_seen=1000, tokens_per_s=100.0 + seed, peak_memory_gib=2.5),
        versions={"torch": "2.0"},
    )


def group(
    label: str, points: Sequence[tuple[float, float]], *, importance: ImportanceSummary | None = None, **settings: str
) -> Group:
    """One run per (loss after learning, forgetting), seeds from 0; the method is the first word of the label."""
    runs = [run_summary(seed, *point, importance=importance) for seed, point in enumerate(points)]
    keys = {key.replace("__", "."): value for key, value in settings.items()}
    return Group(label=label, method=label.split()[0], settings=keys, stages=STAGES, runs=runs)


def pooled(label: str, losses: Sequence[float]) -> Group:
    """A method that learns both domains at once, for which forgetting is not defined."""
    runs = [
        run_summary(seed, loss, 0.0).model_copy(
            update={
                "loss_matrix": [BEFORE, [loss, loss, 3.0]],
                "learned_rows": [1, 1],
                "forgetting": None,
                "forgetting_per_domain": {},
                "forward_transfer": None,
            }
        )
        for seed, loss in enumerate(losses)
    ]
    return Group(label=label, method="pool", settings={}, stages=["before training", "after pool"], runs=runs)


def interval_of_two(first: float, second: float) -> tuple[float, float]:
    """The 95 % t interval of two seeds: their standard error is half their difference."""
    arm = T_OF_TWO * abs(first - second) / 2
    return (first + second) / 2 - arm, (first + second) / 2 + arm


def comparison(*groups: Group, reference: str | None = None, notes: Sequence[str] = ()) -> Comparison:
    """Groups side by side."""
    return Comparison(
        domains=["acl", "pubmed"],
        eval_domains=["acl", "pubmed", "general"],
        groups=list(groups),
        reference=reference or groups[0].label,
        notes=list(notes),
    )


def importance_summary(mask_saturation: float = 0.25, jaccard: float = 0.5) -> ImportanceSummary:
    """Two unit groups, two layers, two sources."""
    overlap = GroupOverlap(
        claimed=[0.2, 0.4],
        jaccard=[[1.0, jaccard], [jaccard, 1.0]],
        cosine=[[1.0, 0.75], [0.75, 1.0]],
        mask_saturation=[mask_saturation, mask_saturation + 0.1],
    )
    return ImportanceSummary(
        granularity="unit",
        threshold=0.9,
        sources=["acl", "pubmed"],
        groups={"head": overlap, "others": overlap.model_copy(update={"mask_saturation": [mask_saturation]})},
    )


def with_scores(scored: Group, score: float) -> Group:
    """A group whose last models score the same on the tasks of both domains, in every metric."""
    matrix = ScoreMatrix(
        scores=[[None, None], [0.5, None], [score, score]],
        forgetting=TaskForgetting(average=None, per_task={}),
        backward_transfer=None,
        forward_transfer=None,
    )
    tasks = [
        ScoredTask(name=f"{domain}_task", domain=domain, row_learned=row, metric="macro_f1", seeds=[0])
        for row, domain in enumerate(("acl", "pubmed"), start=1)
    ]
    scores = RunScores(stages=STAGES, tasks=tasks, matrices=dict.fromkeys(SCORE_NAMES, matrix), missing=[])
    return scored.model_copy(update={"runs": [run.model_copy(update={"end_tasks": scores}) for run in scored.runs]})
