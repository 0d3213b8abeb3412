"""Generates docs/results/evidence.md and its plots from the committed result files: `make evidence`.

Every variant of a result file is in every table; how well it did affects only the words.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.domains.ablation_groups import NOTHING, RestoredLosses
from benchmarks.domains.conclusions import (
    baseline_p_values,
    check_goal,
    compare_pairs,
    compare_with_baseline,
    compared_groups,
    describe_difference,
    relative_forgetting,
)
from benchmarks.domains.jobs import ROOT
from benchmarks.domains.lr_matching import Match
from benchmarks.domains.lr_search import Candidate, Choice, is_naive, naive_front
from benchmarks.domains.plan import NAIVE
from benchmarks.domains.result_file import SuiteResult, TierResult, read_result_file
from benchmarks.domains.tiers import TIERS
from benchmarks.result_io import RESULTS
from das_ds.errors import EXIT_USER_ERROR, DasError, RunFolderError
from das_ds.reporting import comparison_tables as tables
from das_ds.reporting.comparison import Comparison, Group, RunSummary
from das_ds.reporting.comparison_plots import plot_pareto
from das_ds.reporting.comparison_report import explain_intervals
from das_ds.reporting.metrics import (
    FINAL_LOSS,
    FORGETTING,
    LOSS_AFTER_LEARNING_LATER,
    baseline_sweep,
    estimate_metric,
    forgetting_vs_matched_baseline,
)
from das_ds.reporting.statistics import Estimate, Point, interpolate_front
from das_ds.reporting.tables import Row, format_markdown

PAGE = ROOT / "docs" / "results" / "evidence.md"
IMAGES = "images"
REPLAY = "replay"
PROTECTING_METHODS = ("das", "directions")
RIVALS = (REPLAY, "ewc", "kd", "derpp", "merge", "dga")
"""Methods with which a matched variant of das is compared."""


def main() -> int:
    """Write the page; an unusable result file is one line and exit code 2."""
    try:
        write_page(sorted(RESULTS.glob("domains_*.json")), PAGE)
    except DasError as error:
        print(f"das_ds: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    print(f"written to {PAGE.relative_to(ROOT)}")
    return 0


def write_page(paths: Sequence[Path], page: Path) -> None:
    """Write the page for these result files, and one plot per suite.

    Raises:
        RunFolderError: there are no files, or one is damaged.
    """
    if not paths:
        raise RunFolderError(f"{RESULTS}: found no domains_*.json, expected results of `make bench-domains`")
    results = [sort_by_tier(read_result_file(path)) for path in paths]
    (page.parent / IMAGES).mkdir(parents=True, exist_ok=True)
    for result in results:
        for suite in result.suites:
            plot_pareto(suite.comparison, page.parent / plot_path(result, suite))
    page.write_text(page_text(results), encoding="utf-8")


def page_text(results: Sequence[TierResult]) -> str:
    """The page in Markdown."""
    return "\n".join([INTRODUCTION, _summary(results), METHOD, *(_tier_section(result) for result in results)])


def sort_by_tier(result: TierResult) -> TierResult:
    """Choices and groups in the order of the tier's variants, no matter when they were run; all others follow."""
    variants = TIERS[result.tier].variants if result.tier in TIERS else ()
    position = {variant.label: index for index, variant in enumerate(variants)}

    def key(labeled: Choice | Group) -> int:
        return position.get(labeled.label, len(position))

    suites = []
    for suite in result.suites:
        comparison = suite.comparison.model_copy(update={"groups": sorted(suite.comparison.groups, key=key)})
        suites.append(suite.model_copy(update={"comparison": comparison}))
    choices = {base: sorted(of_base, key=key) for base, of_base in result.choices.items()}
    return result.model_copy(update={"suites": suites, "choices": choices})


def plot_path(result: TierResult, suite: SuiteResult) -> str:
    """The file of a suite's plot, relative to the page."""
    return f"{IMAGES}/evidence_{result.tier}_{suite.name}.png"


def _summary(results: Sequence[TierResult]) -> str:
    sections = ["## Summary\n", SUMMARY]
    for result in results:
        for suite in result.suites:
            domains = " -> ".join(suite.comparison.domains)
            table = _table(summary_rows(suite.comparison, _family(result.tier)), text_columns=(0, 6))
            sections.append(f"Tier `{result.tier}`, {suite.base}, {domains}:\n\n{table}")
    return "\n".join(sections)


def summary_rows(comparison: Comparison, family: Sequence[str]) -> list[Row]:
    """What a reader asks first: how much each method learns and forgets, and whether that is more than chance.

    Args:
        comparison: of all groups.
        family: labels of the groups chosen for testing in advance.
    """
    rows: list[Row] = [
        [
            "method",
            "seeds",
            LOSS_AFTER_LEARNING_LATER.title,
            "forgetting",
            "final loss",
            "forgetting vs. naive at equal learning",
            "significance",
        ]
    ]
    p_values = baseline_p_values(comparison, family)
    for group in [comparison.group(comparison.reference), *compared_groups(comparison)]:
        relative = relative_forgetting(comparison, group)
        difference = forgetting_vs_matched_baseline(comparison, group)
        compared = "-" if relative is None else f"{relative:.0%}"
        if group.label == comparison.reference:
            compared = "100% (baseline)"
            significance = "-"
        elif difference is None:
            # It learns more or less than all naive runs, or its forgetting is undefined.
            significance = "no baseline at equal learning"
        else:
            significance = describe_difference(difference, p_values.get(group.label))
        rows.append(
            [
                group.label,
                str(len(group.runs)),
                _format_mean(estimate_metric(group, LOSS_AFTER_LEARNING_LATER)),
                _format_mean(estimate_metric(group, FORGETTING), sign="+"),
                _format_mean(estimate_metric(group, FINAL_LOSS)),
                compared,
                significance,
            ]
        )
    return rows


def _format_mean(estimate: Estimate | None, sign: str = "") -> str:
    return tables.NONE if estimate is None else f"{estimate.mean:{sign}.3f}"


def _tier_section(result: TierResult) -> str:
    train = result.settings["train"]
    seconds = sum(run.cost.wall_seconds for suite in result.suites for run in _runs(suite.comparison))
    parts = [
        f"## Tier {result.tier}\n\n"
        f"{_describe_environment(result.environment)}. "
        f"{train['steps_per_domain']} steps per domain of {train['global_batch_size']} x "
        f"{result.settings['data']['sequence_length']} tokens, {train['precision']}. "
        f"The compared runs took {seconds / 3600:.1f} hours.\n",
        _extended(result),
        _repeated(result),
        _missing(result),
        *(_suite_section(result, suite) for suite in result.suites),
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
    """Variants and seeds of the tier that the results lack, because they were added later or not run yet."""
    if result.tier not in TIERS:
        return ""
    tier = TIERS[result.tier]
    searched = {choice.label for choices in result.choices.values() for choice in choices}
    num_runs = {group.label: len(group.runs) for suite in result.suites for group in suite.comparison.groups}
    missing = []
    incomplete = []
    for variant in tier.variants:
        if variant.label not in (num_runs if variant.is_compared else searched):
            missing.append(variant.label)
        elif variant.is_compared and num_runs[variant.label] < len(tier.run_seeds(variant.label)):
            incomplete.append(variant.label)
    return _list_labels("Not run yet", missing) + _list_labels("Not run yet with all seeds", incomplete)


def _list_labels(what: str, labels: Sequence[str]) -> str:
    return f"{what}: {', '.join(f'`{label}`' for label in labels)}.\n" if labels else ""


def _repeated(result: TierResult) -> str:
    if result.repeated is None:
        return ""
    outcome = "identical results, to the last digit" if result.repeated.is_equal else "**different results**"
    return f"Running the same config and seed twice (`{result.repeated.label}`) gave {outcome}.\n"


def _suite_section(result: TierResult, suite: SuiteResult) -> str:
    comparison = suite.comparison
    family = _family(result.tier)
    parts = [
        f"### {suite.base.capitalize()}: {' -> '.join(comparison.domains)}\n\n{_conclusions(suite, family)}",
        f"#### Learning and forgetting\n\n{explain_intervals(comparison)}\n{_table(tables.summary_rows(comparison))}",
        f"![learning against forgetting]({plot_path(result, suite)})\n",
        f"#### Compared at equal learning\n\n{SWEEP}\n{_table(tables.matched_baseline_rows(comparison, family))}",
        f"#### Compared with {NAIVE}\n\n{_table(tables.difference_rows(comparison, family))}",
        _matches(suite.matches, comparison),
        _ablation(suite.groups, comparison),
        f"#### Cost\n\n{_table(tables.cost_rows(comparison))}",
        _lr_search(result.choices.get(suite.base, [])),
    ]
    return "\n".join(part for part in parts if part)


def _family(tier: str) -> tuple[str, ...]:
    """Labels of the variants that a tier was planned to test, whatever their results."""
    return TIERS[tier].contenders if tier in TIERS else ()


def _conclusions(suite: SuiteResult, family: Sequence[str]) -> str:
    """The goal, then every variant compared with the baseline, then matched variants compared with rivals."""
    comparison = suite.comparison
    labels = [group.label for group in comparison.groups]
    protecting = [group.label for group in comparison.groups if group.method in PROTECTING_METHODS]
    with_replay = [label for label in protecting if REPLAY in label]
    matched = [match.label for match in suite.matches if match.label in protecting]
    rivals = [label for label in labels if label.split()[0] in RIVALS]
    pairs = [*product(matched, rivals), *((label, REPLAY) for label in with_replay if REPLAY in labels)]
    sentences = [
        *(check_goal(comparison, label) for label in protecting if label not in with_replay),
        *(compare_with_baseline(comparison, group, family) for group in compared_groups(comparison)),
        *compare_pairs(comparison, pairs, family),
    ]
    return "".join(f"- {sentence}\n" for sentence in sentences)


def _matches(matches: Sequence[Match], comparison: Comparison) -> str:
    if not matches:
        return ""
    header: Row = [
        "matched variant",
        "loss after learning (2..T)",
        "nearest naive runs",
        "their loss",
        "tolerance",
        "matched",
    ]
    rows = [_match_row(match, comparison) for match in matches]
    return f"#### Naive training at matched learning\n\n{MATCHED}\n{_table([header, *rows])}"


def _match_row(match: Match, comparison: Comparison) -> Row:
    """Computed from the runs themselves, so that it also holds for a match that was searched by another metric."""
    runs = comparison.group(match.label).runs
    seeds = {run.seed for run in runs}
    target = statistics.fmean(run.loss_after_learning_later for run in runs)
    naive_losses = {
        group.label: statistics.fmean(run.loss_after_learning_later for run in group.runs if run.seed in seeds)
        for group in baseline_sweep(comparison)
        if seeds <= {run.seed for run in group.runs}
    }
    if not naive_losses:
        return [match.label, f"{target:.4f}", "-", "-", f"{match.tolerance:g}", "no"]
    nearest = min(naive_losses, key=lambda label: abs(naive_losses[label] - target))
    if abs(naive_losses[nearest] - target) <= match.tolerance:
        outcome = "yes"
    elif target < min(naive_losses.values()):
        outcome = "no: it learns more than naive training"
    else:
        outcome = "no"
    return [match.label, f"{target:.4f}", nearest, f"{naive_losses[nearest]:.4f}", f"{match.tolerance:g}", outcome]


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
    return f"#### Which parameters cause the forgetting\n\n{ABLATION}\n{_table([['restored', *corpora], *rows])}"


def _lr_search(choices: Sequence[Choice]) -> str:
    front = naive_front(choices)
    header: Row = ["variant", "candidates: loss after learning (forgetting; vs. naive)", "chosen", "at the edge"]
    rows = [
        [
            choice.label,
            ", ".join(_format_candidate(one, () if is_naive(choice) else front) for one in choice.candidates),
            f"{choice.learning_rate:g}",
            "yes" if choice.is_at_edge else "no",
        ]
        for choice in choices
    ]
    is_old_format = any(one.learned_later is None for choice in choices for one in choice.candidates)
    text = LR_SEARCH + (OLD_LR_SEARCH if is_old_format else "")
    return f"#### Learning-rate search\n\n{text}\n{_table([header, *rows], text_columns=(0, 1))}"


def _format_candidate(candidate: Candidate, front: Sequence[Point]) -> str:
    """Rate, loss, forgetting, and forgetting relative to naive training at the same matching loss."""
    text = f"{candidate.learning_rate:g}: {candidate.learned:.4f}"
    if candidate.forgetting is None:
        return text
    baseline = interpolate_front(front, candidate.matching_loss)
    relative = f"; {candidate.forgetting / baseline:.0%}" if baseline is not None and baseline > 0 else ""
    return f"{text} ({candidate.forgetting:+.4f}{relative})"


def _runs(comparison: Comparison) -> list[RunSummary]:
    return [run for group in comparison.groups for run in group.runs]


def _table(rows: Sequence[Row], text_columns: tuple[int, ...] = (0,)) -> str:
    return format_markdown(rows, text_columns) + "\n"


INTRODUCTION = """\
# Evidence

Does das_ds forget less than the simple alternatives at equal learning, and at what cost? This page is generated by
`make evidence` from the result files in `benchmarks/results/`; [benchmarks](benchmarks.md) says how they are made.
"""
SUMMARY = f"""\
Losses are nats per predicted token on held-out text, means over domains and seeds; lower is better in every column.
*Loss after learning (2..T)* says how well a method learns: the loss right after training on each domain but the first.
*Forgetting* is the rise of the loss on earlier domains by the end of the run. The *final loss* combines both. A method
that learns less also forgets less, so the column *vs. naive at equal learning* divides its forgetting by that of naive
training (`{NAIVE}`), interpolated between learning rates to the point where both learn equally well: 50% means half as
much forgetting for the same learning. *Significance* refers to that comparison.
"""
METHOD = """\
## How to read the details

*Loss after learning* is the mean over all domains, *(2..T)* that over all but the first. *Equal learning* means equal
loss after learning (2..T): earlier domains are forgotten by learning later ones, and any method can learn the first
domain at full speed.

Brackets are 95 % t intervals over seeds, paired by seed where they belong to differences. p is that of the exact
sign-flip test, Holm-corrected within a family of tests. Families were fixed before the runs (`contenders` in
`benchmarks/domains/tiers.py`): each contender compared with the naive baseline at equal learning; variants with a
matched naive baseline compared with the other contenders, in three metrics each; and, in the table of differences, the
contenders in each column. Variants outside a family are not tested, whatever their interval. A difference is called
significant only if p is at most 0.05. With six seeds the smallest p is 0.03 times the number of tests, so a family of
more than one test cannot reach it. Nothing is omitted: negative results are reported in the same way.
"""
SWEEP = f"""\
A run that learns less also forgets less. Each run is therefore compared, seed by seed, with naive runs (`{NAIVE}`) at
several learning rates, interpolated to the same loss after learning domains 2..T. A negative difference means that it
forgets less than naive training at equal learning.
"""
MATCHED = """\
The learning rate of naive training is lowered until it learns domains 2..T as well as a variant does. These runs are
part of the baseline sweep above.
"""
EXTENDED = """\
Losses of runs from different times are comparable; their costs only roughly.
"""
ABLATION = f"""\
The final model of the first `{NAIVE}` run, with one group of parameters restored to its values from before the last
domain. The fall in the loss on an earlier domain is the forgetting that the group's change has caused; groups interact,
so these contributions need not add up.
"""
LR_SEARCH = """\
Every variant has the same number of candidates, run with one seed that no compared run has, on the first two domains
only; the lowest mean loss after learning is chosen. Some variants were only searched and are in no other table. The
held-out text is that of the comparison. A choice at the edge of the candidates means that a better rate may be outside
their range. *vs. naive* divides the forgetting by that of naive training at equal loss after learning the second
domain, interpolated between its own candidates; it is missing outside their range.
"""
OLD_LR_SEARCH = """\
These choices were made before the loss on the second domain was recorded separately, so they are compared at the mean
loss over both domains, which favors variants that learn the first domain at full speed.
"""

if __name__ == "__main__":
    sys.exit(main())
