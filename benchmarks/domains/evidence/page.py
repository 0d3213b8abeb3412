"""Assembles docs/results/evidence.md and the block of the README from result files."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from benchmarks.domains.evidence.details import IMAGES, format_table, plot_path, tier_section
from benchmarks.domains.evidence.families import ON_END_TASKS, Family, families
from benchmarks.domains.evidence.goals import GOAL_TIER, check_goals
from benchmarks.domains.evidence.headline import (
    README_COLUMNS,
    contenders_of,
    explain_first_form,
    headline_rows,
    labels_in_print,
    limits,
    select_columns,
    sentences,
)
from benchmarks.domains.evidence.length import TIER as LENGTH_TIER
from benchmarks.domains.evidence.length import length_rows, plot_length
from benchmarks.domains.lr_search import Choice
from benchmarks.domains.result_file import SuiteResult, TierResult, read_result_file
from benchmarks.domains.tiers import TIERS
from das_ds.errors import RunFolderError
from das_ds.reporting.comparison import Comparison, Group
from das_ds.reporting.comparison_plots import plot_pareto

HEADLINE_TIERS = (GOAL_TIER, "short", "masks")
"""Tier of the first table: the first of these that has results."""
LENGTH_PLOT = f"{IMAGES}/evidence_{LENGTH_TIER}.png"
LINE_LENGTH = 120
BEGIN = "<!-- evidence: `make evidence` writes what is between these lines -->"
END = "<!-- evidence: end -->"


def read_results(folder: Path) -> list[TierResult]:
    """All results in a folder, in the order of the tiers; those of other tiers follow.

    Raises:
        RunFolderError: there are none, or one is damaged.
    """
    paths = sorted(folder.glob("domains_*.json"))
    if not paths:
        raise RunFolderError(f"{folder}: found no domains_*.json, expected results of `make bench-domains`")
    results = [sort_by_tier(read_result_file(path)) for path in paths]
    order = list(TIERS)
    return sorted(results, key=lambda result: order.index(result.tier) if result.tier in order else len(order))


def write_evidence(results: Sequence[TierResult], page: Path, readme: Path) -> None:
    """Write the page with its plots, and the block of the README.

    Raises:
        RunFolderError: the README lacks the lines between which the block is.
    """
    text = readme_text(results, readme.read_text(encoding="utf-8"))
    (page.parent / IMAGES).mkdir(parents=True, exist_ok=True)
    for result in results:
        for suite in result.suites:
            plot_pareto(suite.comparison, page.parent / plot_path(result, suite))
        if result.tier == LENGTH_TIER:
            plot_length(result, page.parent / LENGTH_PLOT)
    page.write_text(page_text(results), encoding="utf-8")
    readme.write_text(text, encoding="utf-8")


def page_text(results: Sequence[TierResult]) -> str:
    """The page in Markdown."""
    by_tier = {result.tier: result for result in results}
    result, suite = headline(results)
    tasks = find_tasks(results, result, suite)
    table = format_table(headline_rows(suite.comparison, labels_in_print(result, suite), tasks))
    decisive = suite.comparison if result.tier == GOAL_TIER else None
    parts = [
        INTRODUCTION,
        table,
        COLUMNS,
        f"![learning against forgetting]({plot_path(result, suite)})\n",
        wrap(" ".join(sentences(result, suite))),
        "**Limits.**\n\n" + "".join(wrap(f"- {limit}", indent="  ") for limit in limits(results, suite)),
        _goals_section(decisive, tasks),
        _length_section(by_tier.get(LENGTH_TIER)),
        METHOD,
        *(tier_section(one) for one in results),
    ]
    return "\n".join(part for part in parts if part)


def readme_text(results: Sequence[TierResult], readme: str) -> str:
    """The README with the block of these results.

    Raises:
        RunFolderError: it lacks the lines between which the block is.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise RunFolderError(f"README.md: found no block for the evidence, expected it between {BEGIN} and {END}")
    result, suite = headline(results)
    rows = headline_rows(suite.comparison, labels_in_print(result, suite), only=contenders_of(result))
    setting, *others = [
        *sentences(result, suite),
        *explain_first_form(suite.comparison, "docs/methods/directions.md"),
    ]
    units = "Losses are nats per token on held-out text, lower is better; time is relative to naive training."
    block = [
        wrap(f"{setting} {units}"),
        format_table(select_columns(rows, README_COLUMNS)),
        wrap(" ".join(others)),
    ]
    return f"{before}{BEGIN}\n\n{chr(10).join(block)}\n{END}{after}"


def headline(results: Sequence[TierResult]) -> tuple[TierResult, SuiteResult]:
    """The suite of the first table."""
    with_suites = [result for result in results if result.suites]
    for tier in HEADLINE_TIERS:
        for result in with_suites:
            if result.tier == tier:
                return result, result.suites[0]
    return with_suites[0], with_suites[0].suites[0]


def find_tasks(results: Sequence[TierResult], of: TierResult, suite: SuiteResult) -> Comparison | None:
    """Results with scores of end tasks by models of a suite, which another tier may have fine-tuned; None without any.

    Args:
        results: of all tiers.
        of: the tier of the suite.
        suite: whose models are meant.
    """
    same_runs = [of.tier, *(tier.name for tier in TIERS.values() if tier.runs_of == of.tier)]
    for result in results:
        for other in result.suites:
            is_same = result.tier in same_runs and other.name == suite.name
            if is_same and any(run.end_tasks for group in other.comparison.groups for run in group.runs):
                return other.comparison
    return None


def sort_by_tier(result: TierResult) -> TierResult:
    """Choices and groups in the order of the tier's variants, no matter when they were run; all others follow."""
    tier = TIERS.get(result.tier)
    variants = [variant.label for variant in tier.variants] if tier else []
    groups = list(tier.groups) if tier else []

    def group_key(group: Group) -> int:
        return groups.index(group.label) if group.label in groups else len(groups)

    def choice_key(choice: Choice) -> int:
        return variants.index(choice.label) if choice.label in variants else len(variants)

    suites = []
    for suite in result.suites:
        comparison = suite.comparison.model_copy(update={"groups": sorted(suite.comparison.groups, key=group_key)})
        suites.append(suite.model_copy(update={"comparison": comparison}))
    choices = {name: sorted(of_search, key=choice_key) for name, of_search in result.choices.items()}
    return result.model_copy(update={"suites": suites, "choices": choices})


def _goals_section(comparison: Comparison | None, tasks: Comparison | None) -> str:
    planned = [*families(TIERS[GOAL_TIER]), ON_END_TASKS]
    goals = "".join(wrap(goal.describe(), indent="  ") for goal in check_goals(comparison, tasks))
    return f"## Goals\n\n{GOALS}\n{''.join(_describe_family(family) for family in planned)}\n{goals}"


def _describe_family(family: Family) -> str:
    labels = ", ".join(f"`{label}`" for label in family.labels)
    return wrap(f"1. {family.title[0].upper()}{family.title[1:]}: {labels}.", indent="   ")


def wrap(text: str, indent: str = "") -> str:
    """A paragraph or a point of a list, in lines as long as those of other pages."""
    return textwrap.fill(text, LINE_LENGTH, subsequent_indent=indent, break_on_hyphens=False) + "\n"


def _length_section(result: TierResult | None) -> str:
    if result is None or not result.suites:
        return ""
    domains = ", ".join(result.suites[0].comparison.domains)
    return (
        f"## Length of training\n\nThe share of the naive forgetting at equal learning, over {domains}.\n\n"
        f"![share of naive forgetting by steps]({LENGTH_PLOT})\n\n{format_table(length_rows(result))}"
    )


INTRODUCTION = """\
# Evidence

Does das_ds forget less than the simple alternatives at equal learning, and at what cost? This page is generated by
`make evidence` from the result files in `benchmarks/results/`; [benchmarks](benchmarks.md) says how they are made.
"""
COLUMNS = """\
Losses are nats per predicted token on held-out text, means over domains and seeds. *Loss after learning (2..T)* is that
right after training on each domain but the first. *Forgetting* is the rise of the loss on earlier domains by the end.
A method that learns less also forgets less, so the next column divides its forgetting by that of naive training
(`ncl`) of the same seed, interpolated between learning rates to the point where both learn equally well; `none` means
that nothing was forgotten, and `-` that naive training never learned as much or as little. *General* is the rise of the
loss on general text, after the domain where it is highest and at the end. Time and memory are relative to `ncl`.
"""
GOALS = f"""\
Each goal is decided by tier `{GOAL_TIER}`, and the outcome follows from its results. Tests are exact sign-flip tests,
paired by seed; with fewer than six seeds nothing is tested. The families of tests, fixed before the runs
(`against_naive` in `benchmarks/domains/tiers.py`, `benchmarks/domains/evidence/families.py`), each with Holm's
correction for all its members:
"""
METHOD = """\
## How to read the details

*Loss after learning* is the mean over all domains, *(2..T)* that over all but the first. *Equal learning* means equal
loss after learning (2..T): earlier domains are forgotten by learning later ones, and any method can learn the first
domain at full speed. Naive training is interpolated along its Pareto front: a learning rate at which another one learns
more and forgets less does not count.

Brackets are 95 % t intervals over seeds, paired by seed where they belong to differences. p-values are corrected for
their family. Groups outside the families are not tested, whatever their interval. A difference is called significant
only if p is at most 0.05. With six seeds the smallest p is 0.03 times the number of tests, so a family of more than one
test cannot reach it; with eight seeds a family of six can. Nothing is omitted: what does not help is reported in the
same way.

**Equal budgets.** Every variant has the same number of candidate learning rates, with the same rule for further ones.
Where a method has a strength, three values of it are searched, each with all learning rates (`freeze`: two), and the
best is compared; of `directions` as many are searched, but the method as shipped is compared, whatever they give.
Methods without a strength have one set of rates.
"""
