"""How the share of forgetting that is left grows with the length of training: one table and one figure."""

from __future__ import annotations

from pathlib import Path

from benchmarks.domains.evidence.measures import (
    NO_VALUE,
    compared_groups,
    describe_missing_share,
    forgetting_share,
    format_metric,
    format_share_of,
)
from benchmarks.domains.result_file import SuiteResult, TierResult
from das_ds.reporting.metrics import LOSS_AFTER_LEARNING_LATER
from das_ds.reporting.run_plots import DPI, new_figure
from das_ds.reporting.tables import Row

TIER = "length"


def suites_by_length(result: TierResult) -> list[SuiteResult]:
    """The suites in ascending order of their steps."""
    return sorted(result.suites, key=lambda suite: suite.steps_per_domain)


def shares_by_length(result: TierResult) -> dict[str, dict[int, float]]:
    """Label -> steps per domain -> share of the naive forgetting at equal learning, where there is one."""
    shares: dict[str, dict[int, float]] = {}
    for suite in suites_by_length(result):
        for group in compared_groups(suite.comparison):
            share = forgetting_share(suite.comparison, group)
            if share is not None:
                shares.setdefault(group.label, {})[suite.steps_per_domain] = share.mean
    return shares


def length_rows(result: TierResult) -> list[Row]:
    """Method, steps, seeds, learning, share; why where there is none."""
    rows: list[Row] = [["method", "steps", "seeds", LOSS_AFTER_LEARNING_LATER.title, "of naive forgetting"]]
    suites = suites_by_length(result)
    labels = dict.fromkeys(group.label for suite in suites for group in compared_groups(suite.comparison))
    for label in labels:
        for suite in suites:
            for group in suite.comparison.groups:
                if group.label == label:
                    cell = format_share_of(suite.comparison, group)
                    if cell == NO_VALUE:
                        cell = describe_missing_share(suite.comparison, group)
                    learned = format_metric(group, LOSS_AFTER_LEARNING_LATER)
                    rows.append([label, str(suite.steps_per_domain), str(len(group.runs)), learned, cell])
    return rows


def plot_length(result: TierResult, path: Path) -> None:
    """Plot the shares against steps per domain, on a logarithmic axis; naive training is the line at 100 %."""
    figure, axes = new_figure(1, 1, width=7.0, height=4.6)
    plot = axes[0][0]
    for index, (label, shares) in enumerate(shares_by_length(result).items()):
        plot.plot(list(shares), [100 * share for share in shares.values()], "o-", color=f"C{index}", label=label)
    plot.axhline(100, linestyle="--", color="0.45", linewidth=1, label="naive training")
    plot.axhline(0, color="black", linewidth=0.8)
    lengths = [suite.steps_per_domain for suite in suites_by_length(result)]
    plot.set_xscale("log")
    plot.set_xticks(lengths, [str(steps) for steps in lengths])
    plot.minorticks_off()
    plot.set_xlabel("steps per domain")
    plot.set_ylabel("share of naive forgetting at equal learning (%)")
    plot.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=DPI)
