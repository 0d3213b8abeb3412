"""The details of each tier: settings, every metric with its interval, tests, costs and the search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.domains.ablation_groups import NOTHING, RestoredLosses
from benchmarks.domains.evidence.families import families
from benchmarks.domains.evidence.headline import headline_rows, labels_in_print
from benchmarks.domains.lr_search import Candidate, Choice, is_naive, naive_front
from benchmarks.domains.plan import NAIVE, Tier
from benchmarks.domains.result_file import SuiteResult, TierResult
from benchmarks.domains.tiers import TIERS
from das_ds.reporting import comparison_tables as tables
from das_ds.reporting.comparison import Comparison
from das_ds.reporting.comparison_report import explain_intervals
from das_ds.reporting.statistics import Point, interpolate_front
from das_ds.reporting.tables import Row, format_markdown

IMAGES = "images"


def plot_path(result: TierResult, suite: SuiteResult) -> str:
    """The file of a suite's plot, relative to the page."""
    return f"{IMAGES}/evidence_{result.tier}_{suite.name}.png"


def format_table(rows: Sequence[Row], text_columns: tuple[int, ...] = (0,)) -> str:
    """A table in Markdown."""
    return format_markdown(rows, text_columns) + "\n"


def tier_section(result: TierResult) -> str:
    """Everything about a tier."""
    train = result.settings["train"]
    runs = [run for suite in result.suites for group in suite.comparison.groups for run in group.runs]
    hours = sum(run.cost.wall_seconds for run in runs) / 3600
    lengths = " or ".join(str(steps) for steps in dict.fromkeys(suite.steps_per_domain for suite in result.suites))
    parts = [
        f"## Tier {result.tier}\n\n"
        f"{_describe_environment(result.environment)}. {lengths or train['steps_per_domain']} steps per domain of "
        f"{train['global_batch_size']} x {result.settings['data']['sequence_length']} tokens, {train['precision']}. "
        f"The compared runs took {hours:.1f} hours.\n",
        "" if result.tier in TIERS else RETIRED,
        _extended(result),
        _repeated(result),
        _missing(result),
        *(_suite_section(result, suite) for suite in result.suites),
        *(_search(name, choices, result) for name, choices in result.choices.items() if choices),
    ]
    return "\n".join(part for part in parts if part)


def _describe_environment(environment: dict[str, Any]) -> str:
    versions = (f"{name} {number}" for name, number in environment["versions"].items())
    return ", ".join([environment["device"], environment["date"], *versions])


def _extended(result: TierResult) -> str:
    """The origin of earlier results, and how well they agree with later ones."""
    lines = [
        f"Includes earlier results: {_describe_environment(earlier.environment)}. The first run of `{NAIVE}` was then "
        f"repeated; its losses differ by at most {earlier.difference:.2g}.\n"
        for earlier in result.extended
    ]
    return "".join([*dict.fromkeys(lines), EXTENDED]) if lines else ""


def _missing(result: TierResult) -> str:
    """Groups and seeds of the tier that the results lack, because they were added later or not run yet."""
    if result.tier not in TIERS:
        return ""
    tier = TIERS[result.tier]
    lines = []
    for suite in tier.suites:
        known = next((one.comparison.groups for one in result.suites if one.name == suite.name), [])
        num_runs = {group.label: len(group.runs) for group in known}
        missing = [label for label in tier.groups if label not in num_runs]
        incomplete = [label for label in tier.groups if 0 < num_runs.get(label, 0) < len(tier.run_seeds(label))]
        name = f" in `{suite.name}`" if len(tier.suites) > 1 else ""
        lines.append(_list_labels(f"Not run yet{name}", missing))
        lines.append(_list_labels(f"Not run yet with all seeds{name}", incomplete))
    return "\n".join(line for line in lines if line)


def _list_labels(what: str, labels: Sequence[str]) -> str:
    return f"{what}: {', '.join(f'`{label}`' for label in labels)}.\n" if labels else ""


def _repeated(result: TierResult) -> str:
    if result.repeated is None:
        return ""
    outcome = "identical results, to the last digit" if result.repeated.is_equal else "**different results**"
    return f"Running the same config and seed twice (`{result.repeated.label}`) gave {outcome}.\n"


def _suite_section(result: TierResult, suite: SuiteResult) -> str:
    comparison = suite.comparison
    tasks = comparison if any(run.end_tasks for group in comparison.groups for run in group.runs) else None
    names = labels_in_print(result, suite)
    parts = [
        f"### {_title(result, suite)}\n\n{format_table(headline_rows(comparison, names, tasks))}",
        f"![learning against forgetting]({plot_path(result, suite)})\n",
        _tests(comparison, TIERS.get(result.tier)),
        f"#### Learning and forgetting\n\n{explain_intervals(comparison)}\n"
        f"{format_table(tables.summary_rows(comparison))}",
        _equal_learning(comparison),
        f"#### Compared with {NAIVE}\n\n{DIFFERENCES}\n{format_table(tables.difference_rows(comparison, ()))}",
        "" if tasks is None else f"#### End tasks\n\n{format_table(tables.task_rows(comparison), (0, 1, 2, 3))}",
        _ablation(suite.groups, comparison),
        f"#### Cost\n\n{format_table(tables.cost_rows(comparison))}",
    ]
    return "\n".join(part for part in parts if part)


def _title(result: TierResult, suite: SuiteResult) -> str:
    steps = f", {suite.steps_per_domain} steps" if len({one.steps_per_domain for one in result.suites}) > 1 else ""
    return f"{suite.base.capitalize()}: {' -> '.join(suite.comparison.domains)}{steps}"


def _tests(comparison: Comparison, tier: Tier | None) -> str:
    """The outcome of every planned test."""
    lines = []
    for family in families(tier):
        lines.append(f"- {family.title} ({len(family.labels)} {'tests' if len(family.labels) > 1 else 'test'}):\n")
        lines += [f"  - `{test.label}`: {family.describe(test)}\n" for test in family.run(comparison).values()]
    return f"#### Tests\n\n{''.join(lines)}" if lines else ""


def _equal_learning(comparison: Comparison) -> str:
    rows = tables.matched_baseline_rows(comparison, ())
    return f"#### Compared at equal learning\n\n{SWEEP}\n{format_table(rows)}" if len(rows) > 1 else ""


def _ablation(groups: Sequence[RestoredLosses], comparison: Comparison) -> str:
    if not groups:
        return ""
    corpora = comparison.eval_domains
    unchanged = next(row for row in groups if row.group == NOTHING)
    rows: list[Row] = []
    for row in groups:
        cells = [f"{row.losses[corpus]:.4f}" for corpus in corpora]
        if row is not unchanged:
            changes = [row.losses[corpus] - unchanged.losses[corpus] for corpus in corpora]
            cells = [f"{cell} ({change:+.4f})" for cell, change in zip(cells, changes, strict=True)]
        rows.append([row.group, *cells])
    return f"#### Which parameters cause the forgetting\n\n{ABLATION}\n{format_table([['restored', *corpora], *rows])}"


def _search(name: str, choices: Sequence[Choice], result: TierResult) -> str:
    """The candidates of every variant; the chosen strengths are marked."""
    front = naive_front(choices)
    chosen = set(result.strengths.get(name, {}).values())
    header: Row = ["variant", "candidates: loss after learning (forgetting; vs. naive)", "chosen", "at the edge", "end"]
    rows: list[Row] = [
        [
            f"**{choice.label}**" if choice.label in chosen else choice.label,
            ", ".join(_format_candidate(one, () if is_naive(choice) else front) for one in choice.candidates),
            f"{choice.learning_rate:g}",
            "yes" if choice.is_at_edge else "no",
            f"{choice.best.final_loss:.4f}",
        ]
        for choice in choices
    ]
    is_old_format = any(one.learned_later is None for choice in choices for one in choice.candidates)
    text = SEARCH + (OLD_SEARCH if is_old_format else "")
    return f"### Search: {name}\n\n{text}\n{format_table([header, *rows], text_columns=(0, 1))}"


def _format_candidate(candidate: Candidate, front: Sequence[Point]) -> str:
    """Rate, loss, forgetting, and forgetting relative to naive training at the same matching loss."""
    text = f"{candidate.learning_rate:g}: {candidate.learned:.4f}"
    if candidate.forgetting is None:
        return text
    baseline = interpolate_front(front, candidate.matching_loss)
    relative = f"; {candidate.forgetting / baseline:.0%}" if baseline is not None and baseline > 0 else ""
    return f"{text} ({candidate.forgetting:+.4f}{relative})"


RETIRED = """\
An earlier tier, which is no longer run; its results stay, with the labels of today.
"""
SWEEP = f"""\
A run that learns less also forgets less. Each run is therefore compared, seed by seed, with naive runs (`{NAIVE}`) at
several learning rates, interpolated to the same loss after learning domains 2..T. A negative difference means that it
forgets less than naive training at equal learning.
"""
DIFFERENCES = """\
Paired by seed, at whatever each method learned, and not tested.
"""
EXTENDED = """\
Losses of runs from different times are comparable; their costs only roughly.
"""
ABLATION = f"""\
The final model of the first `{NAIVE}` run, with one group of parameters restored to its values from before the last
domain. The fall in the loss on an earlier domain is the forgetting that the group's change has caused; groups interact,
so these contributions need not add up.
"""
SEARCH = """\
Every variant begins with the same number of candidates, run with one seed that no compared run has, on the first two
domains only; the lowest mean loss after learning is chosen. The held-out text is that of the comparison. *vs. naive*
divides the forgetting by that of naive training at equal loss after learning the second domain, interpolated between
its own candidates; it is missing outside their range. *end* is the mean loss of both domains after the second. Variants
in bold are the strengths that are compared; others with a number, and those in no other table, were only searched.
"""
OLD_SEARCH = """\
These choices were made before the loss on the second domain was recorded separately, so they are compared at the mean
loss over both domains, which favors variants that learn the first domain at full speed.
"""
